"""`promptcache parity`."""

from dataclasses import asdict
from typing import Any

import click

from promptcache_cli import output
from promptcache_cli.options import (
    json_option,
    load_generator,
    option,
    prompt_options,
    quiet_option,
)
from promptcache_cli.prompt_options import PromptOptions


@click.command()
@prompt_options
@option(
    "--max-tokens",
    type=click.IntRange(1),
    default=32,
    help="How many tokens of the answer to compare",
)
@json_option
@quiet_option
def parity(
    json_: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Compare a prompt read from nothing with the same prompt resumed

    Stores the prompt up to a cut of every kind in a temporary store, resumes from
    there and compares tokens and log-probabilities. Exits with 1 if tokens differ
    with --exact. With --store-bits it measures what is lost, and tokens may differ.

    Example:

    \b
        promptcache parity -s @narrator.txt "I open the door"
        promptcache parity --exact -f manual.txt "How do I reset it?"
        promptcache parity --store-bits 8 -f manual.txt "How do I reset it?"
    """
    parts = PromptOptions.take(options)
    parts.check()
    from promptcache.parity import check_parity

    console = output.Console(quiet=quiet)
    generator = load_generator(options, console, save=False, reuse=False)
    with console.progress("Comparing", "runs") as progress:
        report = check_parity(
            generator, generator.render_parts(parts), on_progress=progress, **options
        )
    if json_:
        details = {"same_tokens": report.same_tokens, "verdict": report.verdict}
        output.json_data({**asdict(report), **details})
    else:
        _print(report)
    return int(report.is_failure)


def _print(report: Any) -> None:
    headers = ["AT", "REUSED", "TOKENS", "TOP-1", "DIFFERENCE", "KL", "CUT"]
    rows = [
        [
            cut.position,
            cut.cached_tokens,
            "same"
            if cut.first_difference is None
            else f"differ-from-{cut.first_difference}",
            f"{cut.top1_agreement:.1%}",
            f"{cut.largest_difference:.1e}",
            f"{cut.kl_divergence:.1e}",
            cut.kind,
        ]
        for cut in report.cuts
    ]
    output.table(headers, rows)
    output.data("")
    output.data(report.verdict)
