"""`promptcache explain`."""

from typing import TYPE_CHECKING, Any

import click

from promptcache_cli import output
from promptcache_cli.options import (
    draft_option,
    load_generator,
    open_existing,
    prompt_options,
    store_options,
)
from promptcache_cli.prompt_options import PromptOptions

if TYPE_CHECKING:
    from promptcache.explain.types import Explanation


@click.command()
@prompt_options
@draft_option
@store_options
def explain(
    draft_model: str | None,
    store_path: str | None,
    json_: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Say why a prompt would hit or miss

    Takes a prompt as generate does, and reads nothing with the model. Shows how much
    of it is cached, where it parts from what is cached, and the likeliest cause.

    Example:

    \b
        promptcache explain -s @narrator.txt "I open the door"
        promptcache explain -f manual.txt "How do I reset it?" --json
    """
    parts = PromptOptions.take(options)
    parts.check()
    console = output.Console(quiet=quiet)
    with open_existing(store_path) as store:
        generator = load_generator(options, console, store=store, lazy=True)
        explanation = generator.explain(
            generator.render_parts(parts),
            draft_model=draft_model and generator.load_draft(draft_model),
            **options,
        )
    if json_:
        output.json_data(explanation.to_json())
    else:
        _print(explanation)


def _print(explanation: "Explanation") -> None:
    output.data(explanation.verdict)
    if explanation.key is not None:
        output.data(f"key       {explanation.key}")
    if divergence := explanation.divergence:
        output.data(f"position  {divergence.position}")
        output.data(f"expected  {divergence.expected!r}")
        output.data(f"found     {divergence.found!r}")
