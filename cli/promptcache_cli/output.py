"""Output: data on stdout, talk on stderr, for people or as JSON."""

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from promptcache import PromptCacheWarning
from promptcache.units import format_age

if TYPE_CHECKING:
    from promptcache.lint import VolatileText

# Of one kind; more would hide what matters.
MOST_WARNINGS = 5


def data(text: str) -> None:
    """Print a line of data."""
    click.echo(text)


def json_data(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def json_line(value: Any) -> None:
    """Print a value as one line of JSON, where more of them follow."""
    click.echo(json.dumps(value, ensure_ascii=False))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the last column is the only one that may contain spaces."""
    from tabulate import tabulate

    click.echo(tabulate(rows, headers, tablefmt="plain", disable_numparse=True))


class Talk:
    """What goes to stderr; a quiet one says only what went wrong."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Take whether to leave out everything but warnings."""
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Print a line unless quiet."""
        if not self._quiet:
            click.echo(text, err=True)

    @contextlib.contextmanager
    def progress(self, label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar while something long runs; on a terminal only.

        Yields a function to call with how much is done and the total; the bar goes
        away when all is done.
        """
        if self._quiet or not sys.stderr.isatty():
            yield lambda done, total: None
            return
        with _bar(unit) as bar:
            task = bar.add_task(label, total=None)
            first: list[int] = []

            def update(done: int, total: int) -> None:
                # What was there from the start does not count for the speed.
                first.append(done)
                bar.update(task, total=total - first[0], completed=done - first[0])
                if done == total:
                    # What comes next may print on the same terminal.
                    bar.stop()

            yield update


def _bar(unit: str) -> Any:
    # Imported here because it takes 50 ms that most commands do not need.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.0f} {unit}/s" if speed else "")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        Speed(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def show_warnings() -> None:
    """Print promptcache's warnings as one line each, and leave out other libraries'."""
    # A tokenizer warns of prompts that are longer than what it was made with.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", PromptCacheWarning)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"promptcache: warning: {message}", err=True)


def warn_of_volatile_text(found: Sequence["VolatileText"]) -> None:
    """Print a warning for the first ones, and how many there are more."""
    for text in found[:MOST_WARNINGS]:
        click.echo(f"promptcache: warning: {text.message}", err=True)
    if found[MOST_WARNINGS:]:
        more = len(found) - MOST_WARNINGS
        click.echo(f"promptcache: warning: and {more} more like these", err=True)


def ago(seconds: float) -> str:
    """Return how long ago a Unix time was: `3 h ago`."""
    return f"{format_age(time.time() - seconds)} ago"
