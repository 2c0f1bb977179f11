"""Running the command: in this process, or as a real one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from promptcache_cli.main import cli

STORE_TALK = "promptcache: warning: "


def invoke(*args: str | Path, stdin: str | None = None) -> Result:
    """Run a command in this process; an unexpected exception is raised."""
    return CliRunner().invoke(
        cli, [str(arg) for arg in args], input=stdin, catch_exceptions=False
    )


def ok(*args: str | Path, stdin: str | None = None) -> Result:
    """Run a command that must succeed."""
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def assert_fails(result: Result, code: int, *words: str) -> None:
    """Check that a command failed with one line on stderr and nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("promptcache: error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stderr.rstrip("\n").endswith(".")
    for word in words:
        assert word in result.stderr


def start(*args: str | Path, **options: Any) -> "subprocess.Popen[str]":
    """Start the command as a process of its own."""
    command = [sys.executable, "-m", "promptcache_cli"]
    return subprocess.Popen(
        [*command, *(str(arg) for arg in args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **options.pop("env", {})},
        **options,
    )


def tree_hash(folder: Path) -> str:
    """Return a hash over the names and the contents of all files of a folder."""
    checksum = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        checksum.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            checksum.update(path.read_bytes())
    return checksum.hexdigest()


GENERATE_FIELDS = {
    "text": str,
    "token_ids": list,
    "prompt_tokens": int,
    "cached_tokens": int,
    "generation_tokens": int,
    "finish_reason": str,
    "load_seconds": float,
    "prefill_seconds": float,
    "ttft_seconds": float,
    "key": (str, type(None)),
    "saved_seconds": float,
}
