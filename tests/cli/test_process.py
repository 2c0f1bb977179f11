"""The command as a process: closed streams, full disks, limits, early interrupts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from promptcache import PrefixStore
from tests.helpers import segments

PROMPTCACHE = f"{sys.executable} -m promptcache_cli"


@pytest.fixture(autouse=True)
def key(tmp_path: Path) -> str:
    """A prefix in the store, so that there is something to print."""
    with PrefixStore(tmp_path / "store") as store:
        return segments.save(store, segments.tokens(40))


def run(command: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run what a shell is given, in which `promptcache` is the command."""
    return subprocess.run(
        ["bash", "-c", f'promptcache() {{ {PROMPTCACHE} "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("promptcache generate - <&-", 2, "stdin: it is closed"),
        ("promptcache ls >&-", 1, "stdout: it is closed"),
        ("promptcache ls > /dev/full", 1, "stdout: No space left on device"),
    ],
)
def test_streams_that_do_not_work_are_one_line(
    command: str, code: int, words: str
) -> None:
    done = run(command)

    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("promptcache: error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_what_is_done_is_done_though_nobody_can_be_told(key: str) -> None:
    listed = run("promptcache ls 2>&-")
    failed = run("promptcache show nosuch 2> /dev/full")
    removed = run(f"promptcache rm {key} <&- 2> /dev/full")

    assert listed.returncode == 0
    assert key[:12] in listed.stdout
    assert (failed.returncode, failed.stdout) == (1, "")
    assert (removed.returncode, removed.stdout) == (0, f"{key}\n")


def test_reader_that_reads_nothing_gets_no_traceback() -> None:
    done = run("promptcache ls | head -0; echo ${PIPESTATUS[0]}")

    assert done.stdout in ("0\n", "1\n")
    assert "Traceback" not in done.stderr


def test_few_open_files_are_enough(model_dir: Path) -> None:
    generate = f"promptcache generate -m {model_dir} --max-tokens 2 Hello"

    # Without stdin, MLX takes what gets its number for no file.
    done = run(f"ulimit -n 256; {generate} <&-")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


# Says so when an interrupt is taken care of; the next line imports click.
BEGIN = """
import os
import signal
from promptcache_cli.__main__ import main
take = signal.signal
signal.signal = lambda *arguments: print(take(*arguments), flush=True)
main()
"""


def test_interrupt_while_importing_is_one_line(model_dir: Path) -> None:
    command = [sys.executable, "-c", BEGIN, "generate", "-m", str(model_dir), "Hello"]
    for seconds in (0.0, 0.4):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()

        assert process.returncode == 130
        assert stderr.strip() == "promptcache: interrupted"


# Python drops what is raised in here, and goes on.
LOSING = """
import os, signal
class Losing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
Losing()
"""


def test_interrupt_that_an_import_would_lose_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(LOSING)
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"

    done = run("promptcache ls", env={**os.environ, "PYTHONPATH": paths})

    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "promptcache: interrupted\n"
