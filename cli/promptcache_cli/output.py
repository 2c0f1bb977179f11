"""Output: data on stdout, talk on stderr, for people or as JSON.

All that a command prints is printed here: what others wrote must not reach a terminal
as it is.
"""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from promptcache import PromptCacheWarning
from promptcache.printable import printable, printable_json, printable_text
from promptcache.units import format_age

if TYPE_CHECKING:
    from promptcache.explain.lint import VolatileText

# The most of one kind to show; more would hide what matters.
MAX_WARNINGS = 5


def data(line: str) -> None:
    """Print a line of data."""
    _print(printable(line))


def text(lines: str) -> None:
    """Print a text of several lines, for people."""
    _print(printable_text(lines))


def exact(text: str, *, end: str = "\n") -> None:
    """Print what other programs take as it is; a terminal only shows it."""
    if sys.stdout is None or is_terminal(sys.stdout):
        _print(printable_text(text), end=end)
    else:
        _print(_encoded(text + end), end="")


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether somebody may look at a stream; it is None if it is closed."""
    return stream is not None and stream.isatty()


def _encoded(text: str) -> bytes:
    encoding = sys.stdout.encoding
    try:
        # The names of files are bytes that need not be text.
        return text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace")


def _print(shown: str | bytes, *, end: str = "\n") -> None:
    if sys.stdout is None:
        raise click.ClickException("cannot write to stdout: it is closed")
    try:
        click.echo(shown, nl=end == "\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(
            f"cannot write to stdout: {error.strerror}"
        ) from error


def json_data(value: Any) -> None:
    """Print a value as JSON."""
    _print(printable_json(json.dumps(value, indent=2, ensure_ascii=False)))


def json_line(value: Any) -> None:
    """Print a value as one line of JSON, where more of them follow."""
    _print(printable_json(json.dumps(value, ensure_ascii=False)))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the last column is the only one that may contain spaces."""
    from tabulate import tabulate

    shown = [[printable(value) for value in row] for row in rows]
    _print(tabulate(shown, headers, tablefmt="plain", disable_numparse=True))


def say(line: str = "", *, end: str = "\n") -> None:
    """Print a line on stderr."""
    _print_on_stderr(printable(line) + end)


def say_text(lines: str) -> None:
    """Print a text of several lines on stderr."""
    _print_on_stderr(printable_text(lines) + "\n")


def _print_on_stderr(shown: str) -> None:
    # The work goes on, whether or not anybody can read this.
    with contextlib.suppress(OSError):
        click.echo(shown, nl=False, err=True)


def warn(message: object) -> None:
    say(f"promptcache: warning: {message}")


def fail(message: object) -> None:
    say(f"promptcache: error: {message}")


class Console:
    """Information and progress on stderr; a quiet one shows neither."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def info(self, text: str) -> None:
        if not self._quiet:
            say(text)

    @contextlib.contextmanager
    def progress(self, label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar while something long runs; on a terminal only.

        Yields a function to call with how much is done and the total; the bar goes
        away when all is done.
        """
        if self._quiet or not is_terminal(sys.stderr):
            yield lambda done, total: None
            return
        with _bar(unit) as bar:
            task = bar.add_task(printable(label), total=None)
            calls: list[int] = []

            def update(done: int, total: int) -> None:
                # What was there from the start does not count for the speed.
                calls.append(done)
                bar.update(task, total=total - calls[0], completed=done - calls[0])
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
        TextColumn("{task.description}", markup=False),
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


def begin() -> None:
    """Print promptcache's warnings as one line each, and leave out other libraries'.

    What stdout's encoding has no characters for is escaped.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
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
    warn(message)


def end() -> None:
    """Drop what cannot be written, so that Python's exit does not try it again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn_of_volatile_text(texts: Sequence["VolatileText"]) -> None:
    """Print a warning for each of the first texts, and the number of the others."""
    for text in texts[:MAX_WARNINGS]:
        warn(text.message)
    if texts[MAX_WARNINGS:]:
        warn(f"and {len(texts) - MAX_WARNINGS} more like these")


class LogFormatter(logging.Formatter):
    """Writes a message as one line, whatever clients have put there."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without the traceback that may follow."""
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a traceback."""
        return printable_text(super().format(record))


def ago(seconds: float) -> str:
    """Return how long ago a Unix time was: `3 h ago`."""
    return f"{format_age(time.time() - seconds)} ago"
