"""`promptcache generate`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from promptcache import StoreError, UsageError
from promptcache_cli import output
from promptcache_cli.options import (
    draft_option,
    load_generator,
    option,
    option_group,
    prompt_options,
    save_options,
)
from promptcache_cli.prompt_options import PromptOptions

if TYPE_CHECKING:
    from promptcache import Explanation, GenerationResponse


# Of the last response, in JSON.
FIELDS = (
    *("prompt_tokens", "cached_tokens", "generation_tokens", "finish_reason"),
    *("load_seconds", "prefill_seconds", "ttft_seconds", "key", "saved_seconds"),
)


def _not_zero(ctx: click.Context, param: click.Parameter, value: int) -> int:
    if value == 0:
        raise UsageError("--max-tokens must not be 0, use -1 for no limit")
    return value


sampling_options = option_group(
    option(
        "--max-tokens",
        type=click.IntRange(-1),
        callback=_not_zero,
        default=256,
        help="Most tokens to generate, -1 for no limit",
    ),
    option(
        "--temp",
        type=click.FloatRange(0),
        help="Sampling temperature  [default: greedy]",
    ),
    option(
        "--top-p",
        type=click.FloatRange(0, 1),
        help="Sample from the likeliest of this mass",
    ),
    option(
        "--min-p",
        type=click.FloatRange(0, 1),
        help="Least probability against the best token",
    ),
    option("--top-k", type=click.IntRange(0), help="Sample from this many tokens"),
    option("--seed", type=click.IntRange(0, 2**64 - 1), help="Seed for the sampling"),
    option(
        "--repetition-penalty",
        type=click.FloatRange(0),
        help="Penalty for repeated tokens",
    ),
    option(
        "--repetition-context-size",
        type=int,
        default=20,
        help="How many tokens back the penalty looks",
    ),
)


@click.command()
@prompt_options
@sampling_options
@draft_option
@option(
    "--num-draft-tokens",
    type=click.IntRange(1),
    default=2,
    help="How many tokens the draft model proposes at once",
)
@option(
    "--save/--no-save",
    default=None,
    help="Save the prompt, or not  [default: with 512 new tokens or more]",
)
@option("--no-cache", is_flag=True, help="Neither reuse nor save anything")
@option("-u", "--usage", is_flag=True, help="Print one line of figures on stderr")
@save_options
def generate(
    draft_model: str | None,
    save: bool | None,
    no_cache: bool,
    usage: bool,
    json_: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate text, reusing the longest cached prefix of the prompt

    Prints only the text; on a terminal, control characters in it are escaped. The
    answer is never saved.

    Example:

    \b
        promptcache generate "Hello"
        promptcache generate -s @narrator.txt -u "I open the door"
        promptcache generate -f manual.txt "How do I reset it?"
    """
    parts = PromptOptions.take(options)
    parts.check()
    if no_cache and save:
        raise UsageError("use just one of --no-cache and --save")
    console = output.Console(quiet=quiet)
    generator = load_generator(
        options,
        console,
        reuse=not no_cache,
        save=False if no_cache else "auto" if save is None else save,
    )
    draft = draft_model and generator.load_draft(draft_model)
    prompt = generator.render_parts(parts)
    explanation = None
    if usage and not no_cache:
        # Afterwards the prompt may be stored itself.
        explanation = explain_if_readable(
            generator.explain, prompt, draft_model=draft, **read_options(options)
        )
    with generator, console.progress("Reading", "tokens") as progress:
        stream = generator.stream_generate(
            prompt, draft_model=draft, prompt_progress_callback=progress, **options
        )
        # Closed before the store is, also when stdout is closed early.
        with contextlib.closing(stream):
            responses = list(streamed(stream, echo=not json_))
    if json_:
        output.json_data(answer_as_json(responses))
    if usage:
        output.say(usage_line(responses[-1], explanation))


def streamed(
    responses: Iterator["GenerationResponse"], *, echo: bool
) -> Iterator["GenerationResponse"]:
    """Pass responses on, printing their text as it comes."""
    for response in responses:
        if echo:
            output.exact(response.text, end="")
        yield response
    if echo:
        output.exact("")


def answer_as_json(responses: list["GenerationResponse"]) -> dict[str, object]:
    """Return an answer as JSON shows it."""
    last = responses[-1]
    return {
        "text": "".join(response.text for response in responses),
        "token_ids": [response.token for response in responses],
        **{name: getattr(last, name) for name in FIELDS},
    }


def explain_if_readable(
    explain: "Callable[..., Explanation]", prompt: Any, **options: Any
) -> "Explanation | None":
    """Return why a prompt hits or misses, or None if the store cannot be read."""
    with contextlib.suppress(StoreError):
        return explain(prompt, **options)
    return None


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a command that the KV values depend on."""
    from promptcache.models.settings import ReadOptions

    names = ReadOptions.__annotations__
    return {name: options[name] for name in options if name in names}


def usage_line(
    last: "GenerationResponse", explanation: "Explanation | None" = None
) -> str:
    """Return what `--usage` prints, with the reason if a prompt missed."""
    line = (
        f"{last.prompt_tokens} prompt tokens, {last.cached_tokens} cached, "
        f"{last.prompt_tokens - last.cached_tokens} prefilled, "
        f"{last.generation_tokens} generated, "
        f"{last.ttft_seconds:.3f} s to the first token"
    )
    if last.declined is not None:
        return f"{line}; cached tokens were prefilled again: {last.declined}"
    if explanation is None or not explanation.is_miss:
        return line
    divergence = explanation.divergence
    assert divergence is not None
    return f"{line}; missed from token {divergence.position} on: {divergence.culprit}"
