"""`promptcache build`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from promptcache_cli import output
from promptcache_cli.options import (
    draft_option,
    load_generator,
    open_store,
    prompt_options,
    save_options,
)
from promptcache_cli.prompt_options import PromptOptions

if TYPE_CHECKING:
    from promptcache import BuiltPrefix, VolatileText

FIELDS = (
    *("key", "name", "model", "num_tokens", "cached_tokens"),
    *("nbytes", "seconds"),
)


@click.command()
@prompt_options
@draft_option
@click.option("--name", help="Pin the prefix under this name, so that it stays")
@save_options
def build(
    draft_model: str | None,
    name: str | None,
    store_path: str | None,
    max_size: int | None,
    daily_writes: int | None,
    json_: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Read a prefix once and save it

    Without PROMPT, what comes before the user's text is saved: the system prompt,
    the tools and the files. An interrupted build resumes where it stopped. Prints
    the key. Warns of text that is likely to change, such as a date, because what
    comes after it would have to be read again.

    Example:

    \b
        promptcache build -s @narrator.txt --name narrator
        promptcache build -f manual.txt
    """
    console = output.Console(quiet=quiet)
    parts = PromptOptions.take(options)
    parts.check_prefix()
    with open_store(store_path, max_size, daily_writes, say=console.info) as store:
        generator = load_generator(options, console, store=store)
        prompt = generator.render_prefix(parts)
        volatile = generator.lint(prompt)
        output.warn_of_volatile_text(volatile)
        with console.progress("Reading", "tokens") as progress:
            prefix = generator.build(
                prompt,
                name=name,
                draft_model=draft_model and generator.load_draft(draft_model),
                prompt_progress_callback=progress,
                **options,
            )
    if json_:
        output.json_data(_as_json(prefix, volatile))
        return
    output.data(prefix.key)
    console.info(
        f"{prefix.num_tokens} tokens of {prefix.model}, "
        f"{prefix.cached_tokens} were there already, {prefix.seconds:.1f} s"
    )


def _as_json(
    prefix: "BuiltPrefix", volatile: Sequence["VolatileText"]
) -> dict[str, object]:
    values = {name: getattr(prefix, name) for name in FIELDS}
    return {**values, "volatile": [text._asdict() for text in volatile]}
