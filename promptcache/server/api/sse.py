"""Server-sent events, as bytes."""

import json
from typing import Any, Final

DONE: Final = b"data: [DONE]\n\n"


def sse_message(data: Any, event: str | None = None) -> bytes:
    """Return a message with JSON as data, and the name of its event if it has one.

    Only ASCII, because some clients take other separators of lines for ends of lines.
    """
    name = "" if event is None else f"event: {event}\n"
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return f"{name}data: {text}\n\n".encode("ascii")


def keepalive(done: int, total: int) -> bytes:
    """Return a comment that keeps a connection alive while a prompt is read."""
    return f": keepalive {done}/{total}\n\n".encode("ascii")
