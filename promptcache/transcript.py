"""Transcripts: the file in which a conversation is written down as it goes on.

A line is added for everything said, for an answer piece by piece, before it is shown:
whatever kills the process, nothing that was shown is lost.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from promptcache.errors import StoreError, UsageError

VERSION = 1
INTERRUPTED = "interrupted"


class Transcript:
    """The messages of one conversation, and the file that keeps them.

    Invariants:
        What `messages` holds is in the file, if there is one.
        A file is only ever added to.

    Attributes:
        head: What the conversation started with: `system`, `tools` and
            `chat_template_config`.
        messages: The chat messages, without a system prompt.
        key: Of the prefix that was saved with the last answer, or None.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]) -> None:
        """Open a transcript; a file that is there goes on with its own head.

        Args:
            path: The file, or None to keep it in memory only.
            head: What a new conversation starts with. None is said of what is None.

        Raises:
            UsageError: The file belongs to a conversation that started otherwise.
            StoreError: It cannot be read or written.
        """
        self.head = dict(head)
        self.messages: list[dict[str, Any]] = []
        self.key: str | None = None
        self._is_answering = False
        self._file: _LineFile | None = None
        if path is None:
            return
        self._file = _LineFile(path)
        try:
            if lines := self._file.read():
                self._read(path, lines)
            else:
                self._add({"version": VERSION, **head})
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path, lines: list[bytes]) -> None:
        try:
            head, *events = map(json.loads, lines)
            version = head.pop("version")
            given = {k: v for k, v in self.head.items() if v is not None}
            self.head = {**dict.fromkeys(self.head), **head}
            for event in events:
                self._apply(event)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise StoreError(f"{path} is no transcript of a conversation") from error
        if version > VERSION:
            raise StoreError(f"a newer promptcache wrote {path}, upgrade promptcache")
        for name, value in given.items():
            if value != self.head[name]:
                raise UsageError(
                    f"this conversation began with another {name}, leave it out or "
                    "begin one under another name"
                )
        if self._is_answering:
            self.end(INTERRUPTED)

    @property
    def is_ended(self) -> bool:
        """Return whether the last thing said, if any, is an answer that has ended."""
        said = self.messages
        return not self._is_answering and (not said or said[-1]["role"] != "user")

    def _apply(self, event: dict[str, Any]) -> None:
        """Take over what a line says."""
        if "message" in event:
            self.messages.append(event["message"])
        elif "text" in event:
            if not self._is_answering:
                self.messages.append({"role": "assistant", "content": ""})
            self._is_answering = True
            self.messages[-1]["content"] += event["text"]
        elif "end" in event:
            self._is_answering = False
            self.key = event.get("key", self.key)
        elif "undo" in event:
            del self.messages[-event["undo"] :]

    def _add(self, event: dict[str, Any], *, durably: bool = True) -> None:
        if self._file is not None:
            self._file.add(json.dumps(event), durably=durably)
        self._apply(event)

    def add(self, message: Mapping[str, Any]) -> None:
        """Add a whole message. Raises StoreError."""
        self._add({"message": dict(message)})

    def add_text(self, text: str) -> None:
        """Add a piece of an answer. Raises StoreError."""
        self._add({"text": text}, durably=False)

    def end(self, reason: str, *, key: str | None = None) -> None:
        """End the answer, also one without a text. Raises StoreError.

        `key` is that of the prefix that was saved with it.
        """
        if not self._is_answering:
            self.add_text("")
        self._add({"end": reason, **({"key": key} if key else {})})

    def undo(self) -> bool:
        """Take back the last user's message and what followed; tell if there was one.

        Raises StoreError.
        """
        places = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if places:
            self._add({"undo": len(self.messages) - places[-1]})
        return bool(places)

    def close(self) -> None:
        """Close the file, so that another process may go on with it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _LineFile:
    """A file of lines that one process at a time adds to."""

    def __init__(self, path: Path) -> None:
        # Imported here because it takes 30 ms, which most commands can do without.
        import filelock

        self._path = path
        with self._translated():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = filelock.FileLock(f"{path}.lock", mode=0o600)
            try:
                self._lock.acquire(blocking=False)
            except filelock.Timeout as error:
                raise UsageError(
                    "another process has this conversation open, close it first"
                ) from error
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(path, flags, 0o600)

    def read(self) -> list[bytes]:
        """Return the lines; a last one that was not written in full goes."""
        with self._translated():
            with open(self._descriptor, "rb", closefd=False) as file:
                content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                os.ftruncate(self._descriptor, end)
        return content[:end].splitlines()

    def add(self, line: str, *, durably: bool) -> None:
        """Add a line; if durably, a power failure does not take it either."""
        with self._translated():
            os.write(self._descriptor, f"{line}\n".encode())
            if durably:
                os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
        self._lock.release()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the conversation cannot be kept in {self._path} ({error.strerror})"
            ) from error


def transcript_path(folder: Path, name: str) -> Path:
    """Return where a conversation of this name is kept in a store's folder.

    Raises:
        UsageError: The name cannot be one.
    """
    if not name.strip() or not name.isprintable() or len(quote(name, safe=" ")) > 200:
        raise UsageError(
            f"{name[:40]!r} cannot name a conversation, use printable characters"
        )
    # A name is no path: neither `..` nor `/` mean anything.
    quoted = quote(name, safe=" ").replace(".", "%2E")
    return folder / "chats" / f"{quoted}.jsonl"
