"""The `promptcache` command, from the first moment on; `python -m promptcache_cli`.

It imports next to nothing before an interrupt ends it in one line.
"""

import contextlib
import os
import signal
from types import FrameType
from typing import NoReturn

from promptcache_cli import INTERRUPTED


def main() -> None:
    """Run the command and exit."""
    try:
        signal.signal(signal.SIGINT, _on_interrupt)
        _open_streams()
        _tolerate_limits()
        from promptcache_cli.main import cli

        cli(prog_name="promptcache")
    except KeyboardInterrupt:
        _leave()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end at once while a module is imported.

    An exception may get lost there, as Python drops errors of its own callbacks.
    No data is lost either way: a store survives any end of the process.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave() -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"promptcache: interrupted\n")
    os._exit(INTERRUPTED)


def _open_streams() -> None:
    """Open those of stdin, stdout and stderr that are closed as `/dev/null`.

    Otherwise the next file that is opened gets the number of one of them, and what is
    written there ends up in that file; MLX does not accept a file with number 0.
    """
    while (descriptor := os.open(os.devnull, os.O_WRONLY)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _tolerate_limits() -> None:
    """Make mlx-lm importable where it may not raise the limit on open files."""
    import resource

    set_limit = resource.setrlimit

    def set_limit_if_allowed(which: int, limits: tuple[int, int]) -> None:
        try:
            set_limit(which, limits)
        except ValueError:
            if which != resource.RLIMIT_NOFILE:
                raise

    resource.setrlimit = set_limit_if_allowed


if __name__ == "__main__":
    main()
