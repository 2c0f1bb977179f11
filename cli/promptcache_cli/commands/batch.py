"""`promptcache batch`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from promptcache import PromptCacheError
from promptcache_cli import output
from promptcache_cli.commands.generate import sampling_options
from promptcache_cli.options import (
    TEXT_FILE,
    cache_options,
    load_generator,
    model_options,
    option,
    save_options,
    system_option,
)

if TYPE_CHECKING:
    from promptcache import BatchResult, CachedGenerator
    from promptcache.project.batch_file import BatchFile


@click.command()
@click.argument("file", type=TEXT_FILE, metavar="FILE")
@option(
    "-o",
    "--output",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where to append the answers, a JSON object in each line",
)
@model_options
@system_option
@option("--raw", is_flag=True, help="Do not use the chat template")
@cache_options
@sampling_options
@save_options
def batch(
    file: str,
    path: Path,
    system: str | None,
    raw: bool,
    max_tokens: int,
    json_: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Answer the prompts of a file together

    Each line of FILE is a JSON object with a prompt (text) or messages, and perhaps
    an id and max_tokens; - is stdin. What prompts have in common is read once. A line
    that fails becomes one with its error, and the others go on.

    Interrupted, it goes on with what is not done when it is started again.

    Example:

    \b
        promptcache batch questions.jsonl -o answers.jsonl -s @narrator.txt
    """
    from promptcache.project.batch_file import BatchFile

    console = output.Console(quiet=quiet)
    lines = BatchFile(file, path)
    started = time.perf_counter()
    generator = load_generator(options, console)
    with generator:
        tally = _run(generator, lines, system, raw, max_tokens, options, console)
    seconds = time.perf_counter() - started
    if json_:
        output.json_data({**tally, "before": lines.num_done, "seconds": seconds})
    else:
        console.info(
            f"{tally['done']} answered, {tally['failed']} failed, {lines.num_done} "
            f"done before; {tally['cached_tokens']} of {tally['prompt_tokens']} prompt "
            f"tokens cached, {seconds:.1f} s"
        )
    if tally["failed"]:
        raise click.exceptions.Exit(1)


def _run(
    generator: "CachedGenerator",
    lines: "BatchFile",
    system: str | None,
    raw: bool,
    max_tokens: int,
    options: dict[str, Any],
    console: output.Console,
) -> dict[str, int]:
    """Answer what is not done; return how it went."""
    names = ("done", "failed", "prompt_tokens", "cached_tokens", "generation_tokens")
    tally = dict.fromkeys(names, 0)
    write = lines.writer()
    total = len(lines.lines) - lines.num_done

    def note(index: int, answer: dict[str, Any]) -> None:
        write(index, answer)
        tally["failed" if "error" in answer else "done"] += 1
        for name in names[2:]:
            tally[name] += answer.get(name, 0)
        progress(tally["done"] + tally["failed"], total)

    with console.progress("Answering", "prompts") as progress:
        progress(0, total)
        for window in lines.windows():
            prompts, limits, indexes = [], [], []
            for index in window:
                try:
                    parts = lines.prompt(index, system, raw=raw)
                    limits.append(lines.limit(index, max_tokens))
                    prompts.append(generator.render_parts(parts))
                    indexes.append(index)
                except PromptCacheError as error:
                    del limits[len(prompts) :]
                    note(index, {"error": str(error)})
            for result in generator.stream_batch(prompts, limits, **options):
                note(indexes[result.index], _answer(result))
    return tally


def _answer(result: "BatchResult") -> dict[str, Any]:
    """Return what has come of a prompt."""
    last = result.last
    if result.error is not None or last is None:
        return {"error": str(result.error).splitlines()[0]}
    return {
        "text": result.text,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "cached_tokens": last.cached_tokens,
        "generation_tokens": last.generation_tokens,
    }
