"""Batch files: prompts a line each, and their answers a line each.

Answers are appended as they are done. A batch that was interrupted goes on where it
was: an answer names the line that it is for by its number and its hash.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from promptcache.errors import PromptCacheError, UsageError
from promptcache.prompts.chat import is_messages
from promptcache.prompts.parts import PromptParts, parse_json

FIELDS = {"prompt", "messages", "id", "max_tokens"}
# Prompts that are rendered and run together; what more have in common is read again.
WINDOW = 512


class BatchFile:
    """The prompts of one file, and the answers to them in another one.

    Attributes:
        lines: The prompts' lines, as they are.
        num_done: How many of them had an answer at the start.
    """

    def __init__(self, text: str, path: Path) -> None:
        """Take the prompts, and see what is done.

        Args:
            text: The prompts, a JSON object in each line.
            path: Where the answers are, or are to be.

        Raises:
            UsageError: That file holds something else.
        """
        self.lines = [line for line in text.splitlines() if line.strip()]
        self._hashes = [xxhash.xxh3_64_hexdigest(line.encode()) for line in self.lines]
        self._path = path
        kept = self._kept_answers()
        self._done = {answer["index"] for answer in kept}
        self.num_done = len(self._done)
        self._rewrite(kept)

    def _kept_answers(self) -> list[dict[str, Any]]:
        """Return the answers that are there; lines that failed are tried again."""
        if not self._path.exists():
            return []
        kept = []
        # A crash may have left a part of a line.
        for line in self._path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            answer = parse_json(line, str(self._path))
            if not self._is_answer(answer):
                raise UsageError(f"{self._path} holds something else than its answers")
            if "error" not in answer:
                kept.append(answer)
        return kept

    def _is_answer(self, answer: Any) -> bool:
        index = answer.get("index") if isinstance(answer, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(self.lines):
            return False
        return bool(answer.get("input") == self._hashes[index])

    def _rewrite(self, answers: Sequence[dict[str, Any]]) -> None:
        """Leave these answers only, at once."""
        if not self._path.exists():
            return
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_text("".join(f"{_line(answer)}\n" for answer in answers))
        os.replace(new, self._path)

    def windows(self) -> Iterator[list[int]]:
        """Yield the numbers of the lines to do, as many as run together."""
        left = [i for i in range(len(self.lines)) if i not in self._done]
        for start in range(0, len(left), WINDOW):
            yield left[start : start + WINDOW]

    def prompt(self, index: int, system: str | None, *, raw: bool) -> PromptParts:
        """Return the prompt of a line. Raises UsageError."""
        given = self._given(index)
        if ("prompt" in given) == ("messages" in given):
            raise UsageError("give either prompt or messages")
        if "messages" in given:
            if not is_messages(given["messages"]):
                raise UsageError("messages must be a list of chat messages")
            return PromptParts(messages=given["messages"])
        if not isinstance(given["prompt"], str):
            raise UsageError("prompt must be text")
        return PromptParts(prompt=given["prompt"], system=system, raw=raw)

    def limit(self, index: int, otherwise: int) -> int:
        """Return how many tokens to generate for a line. Raises UsageError."""
        limit = self._given(index).get("max_tokens", otherwise)
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise UsageError("max_tokens must be an integer")
        return limit

    def _given(self, index: int) -> dict[str, Any]:
        given = parse_json(self.lines[index], "the line")
        if not isinstance(given, dict):
            raise UsageError("the line must be a JSON object")
        for name in sorted(given.keys() - FIELDS):
            raise UsageError(f"{name} is not supported")
        return given

    def writer(self) -> Callable[[int, dict[str, Any]], None]:
        """Return a function that appends what has come of a line."""
        file = self._path.open("a")

        def write(index: int, answer: dict[str, Any]) -> None:
            place = {"index": index, "input": self._hashes[index]}
            file.write(f"{_line({**self._name(index), **place, **answer})}\n")
            file.flush()

        return write

    def _name(self, index: int) -> dict[str, Any]:
        """Return the id of a line, if it has one."""
        try:
            given = self._given(index)
        except PromptCacheError:
            return {}
        return {"id": given["id"]} if "id" in given else {}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
