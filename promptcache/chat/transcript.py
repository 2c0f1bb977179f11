"""Transcripts: the file that records a conversation as it happens.

Each message, and each piece of an answer, is added as a line before it is shown:
nothing that was shown is lost, whatever kills the process.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import xxhash

from promptcache.errors import StoreError, UsageError
from promptcache.files import (
    check_private,
    create_folder,
    fsync_file,
    lock_at_once,
    make_path_durable,
    open_private,
)
from promptcache.locks import holder_of, told

VERSION = 1
INTERRUPTED = "interrupted"
# How a file begins whose first line was not written in full.
BEGINNING = b'{"version"'


class Transcript:
    """The messages of one conversation, and the file that keeps them.

    Invariants:
        What `messages` holds is in the file, if there is one.
        A file is only ever added to, and one that is not a transcript is left alone.

    Attributes:
        head: What the conversation started with: `system`, `tools` and
            `chat_template_config`.
        messages: The chat messages, without a system prompt.
        key: Of the prefix that was saved last, or None.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]) -> None:
        """Open a transcript; an existing file keeps its own head.

        Args:
            path: The file, or None to keep it in memory only.
            head: What a new conversation starts with. A value of None fits any file.

        Raises:
            UsageError: The file belongs to a conversation that started differently,
                or a different process has it open.
            StoreError: It cannot be read or written, or is not a transcript.
        """
        # As the file gives it back.
        self.head = json.loads(_encoded(head))
        self.messages: list[dict[str, Any]] = []
        self.key: str | None = None
        self._is_answering = False
        self._file: _LineFile | None = None
        if path is None:
            return
        first = _encoded({"version": VERSION, **self.head})
        self._file = _LineFile(path)
        try:
            lines = self._file.lines()
            if lines:
                self._read(path, lines)
                self._file.cut_torn_line()
                self._end_interrupted()
            else:
                with self._file.added(first, durably=True):
                    pass
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path, lines: list[bytes]) -> None:
        expected = {k: v for k, v in self.head.items() if v is not None}
        try:
            head = json.loads(lines[0])
            version = head.pop("version")
            if version <= VERSION:
                self.head = {**dict.fromkeys(self.head), **head}
                for line in lines[1:]:
                    self._apply(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise StoreError(f"{path} is not a transcript of a conversation") from None
        if version > VERSION:
            raise StoreError(f"a newer promptcache wrote {path}, upgrade promptcache")
        for name, value in expected.items():
            if (value or None) != (self.head[name] or None):
                raise UsageError(
                    f"this conversation began with another {name}, leave it out or "
                    "begin one under another name"
                )

    def _end_interrupted(self) -> None:
        if self._is_answering:
            self.end(INTERRUPTED)

    @property
    def is_ended(self) -> bool:
        """Return whether the last message, if any, is an answer that has ended."""
        messages = self.messages
        is_open = bool(messages) and messages[-1]["role"] == "user"
        return not self._is_answering and not is_open

    def _apply(self, event: Mapping[str, Any]) -> None:
        if "message" in event:
            message = event["message"]
            # A message without a role cannot be continued.
            self.messages.append({**message, "role": str(message["role"])})
        elif "text" in event:
            if not self._is_answering:
                self.messages.append({"role": "assistant", "content": ""})
            self._is_answering = True
            self.messages[-1]["content"] += event["text"]
        elif "end" in event:
            self._is_answering = False
        elif "undo" in event:
            del self.messages[-event["undo"] :]
        elif "key" in event:
            self.key = event["key"]

    def _add(self, event: Mapping[str, Any], *, durably: bool = True) -> None:
        if self._file is None:
            self._apply(event)
            return
        # Neither is done without the other, whatever interrupts it.
        with self._file.added(_encoded(event), durably=durably):
            self._apply(event)

    def add(self, message: Mapping[str, Any]) -> None:
        """Add a whole message. Raises StoreError."""
        self._add({"message": dict(message)})

    def add_text(self, text: str) -> None:
        """Add a piece of an answer. Raises StoreError."""
        self._add({"text": text}, durably=False)

    def end(self, reason: str) -> None:
        """End the answer, also one without a text. Raises StoreError."""
        if not self._is_answering:
            self.add_text("")
        self._add({"end": reason})

    def note_key(self, key: str) -> None:
        """Note the key of the prefix that was saved with the answer.

        Raises StoreError.
        """
        self._add({"key": key}, durably=False)

    def undo(self) -> bool:
        """Remove the last user's message and the rest; return whether one existed.

        Raises StoreError.
        """
        self._end_interrupted()
        places = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if places:
            self._add({"undo": len(self.messages) - places[-1]})
        return bool(places)

    def close(self) -> None:
        """Close the file, so that a different process may open it."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _encoded(event: Mapping[str, Any]) -> bytes:
    """Return an event as a line. Raises UsageError if it holds what JSON cannot."""
    try:
        return f"{json.dumps(event)}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"this cannot be kept as JSON: {error}") from error


class _LineFile:
    """A file of lines that one process at a time adds to."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        self._path = path
        with self._translated():
            # It stays the same file when the process changes its directory.
            self._path = path.absolute()
            _create_folder(self._path.parent)
            self._descriptor = open_private(self._path)
        try:
            with self._translated():
                self._lock(self._descriptor)
        except BaseException:
            self.close()
            raise

    def _lock(self, descriptor: int) -> None:
        try:
            lock_at_once(descriptor)
        except BlockingIOError as error:
            raise UsageError(
                f"{told(holder_of(self._path))} has this conversation open, close it "
                "first"
            ) from error
        if not os.fstat(descriptor).st_size:
            make_path_durable(self._path.parent)

    def lines(self) -> list[bytes]:
        """Return the lines that were written in full.

        Raises StoreError for a file that does not even begin like a transcript.
        """
        content = self._content()
        end = content.rfind(b"\n") + 1
        torn = content[:end] or content
        if torn and not torn.startswith(BEGINNING[: len(torn)]):
            raise StoreError(f"{self._path} is not a transcript of a conversation")
        if not end:
            self.cut_torn_line()
        return content[:end].splitlines()

    def _content(self) -> bytes:
        with self._translated(), open(self._open(), "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def cut_torn_line(self) -> None:
        """Cut off a last line that was not written in full, if there is one."""
        content = self._content()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self._translated():
                os.ftruncate(self._open(), end)

    @contextlib.contextmanager
    def added(self, line: bytes, *, durably: bool) -> Iterator[None]:
        """Add a line, and remove it again if the block fails.

        If durably, it survives a power failure. Raises StoreError.
        """
        with self._translated():
            descriptor = self._open()
            start = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                # On a disk that is nearly full, only a part may be written.
                while line:
                    line = line[os.write(descriptor, line) :]
                if durably:
                    fsync_file(descriptor)
                yield
            except BaseException:
                os.ftruncate(descriptor, start)
                raise

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            raise StoreError("the conversation is closed")
        return self._descriptor

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the conversation cannot be kept in {self._path} ({error.strerror})"
            ) from error


def _create_folder(folder: Path) -> None:
    """Create a private folder, durably; an existing one must be private.

    Raises StoreError, and OSError.
    """
    check_private(folder)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        create_folder(folder)
        make_path_durable(folder.parent)


def transcript_path(folder: Path, name: str, *, namespace: str = "") -> Path:
    """Return where a conversation of this name is kept in a store's folder.

    Each namespace has its own conversation of a name.

    Raises:
        UsageError: The name is not valid.
    """
    if not name.strip() or not name.isprintable() or len(quote(name, safe=" ")) > 200:
        raise UsageError(
            f"{name[:40]!r} cannot name a conversation, use printable characters"
        )
    # A name is not a path: neither `..` nor `/` mean anything.
    quoted = quote(name, safe=" ").replace(".", "%2E")
    # No quoted name has an `@`, and a namespace may be longer than a file's name.
    owner = xxhash.xxh3_128_hexdigest(namespace.encode()) + "@" if namespace else ""
    return folder / "chats" / f"{owner}{quoted}.jsonl"
