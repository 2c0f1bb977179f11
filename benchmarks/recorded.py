"""Requests that were recorded: Mooncake's traces, and sessions of agents.

A file with the ending `.jsonl` is in the format of Mooncake's traces, a folder of
`.json` files is of sessions as SemiAnalysis publishes them. Both name the blocks of
prompts by hashes of what they hold and come after, and tell no tokens.
"""

import json
from array import array
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# One session of a folder begins every half an hour; each clock starts at 0 there.
SECONDS_BETWEEN_SESSIONS = 1800.0


class Request(NamedTuple):
    """A prompt: its length, and the number of each block, equal where prefixes are."""

    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their times.

    Attributes:
        name: Where they come from.
        block_size: Tokens of a block.
        requests: All of them.
    """

    name: str
    block_size: int
    requests: Sequence[Request]

    def token_ids(self, request: Request) -> Sequence[int]:
        """Return token ids that are equal as far as the blocks are.

        All tokens of a block have its number, so that others differ from the first on.
        """
        ids = array("I")
        for number in request.blocks:
            ids += array("I", [number]) * self.block_size
        return ids[: request.num_tokens]

    def asked_at(self) -> Mapping[int, Sequence[int]]:
        """Return the numbers of the requests that have each block."""
        found = defaultdict(list)
        for number, request in enumerate(self.requests):
            for block in request.blocks:
                found[block].append(number)
        return found


class Entry(NamedTuple):
    """A request as a file has it; `scope` is where its hashes are unique."""

    at: float
    num_tokens: int
    scope: Hashable
    hash_ids: Sequence[int]


def read_trace(path: Path, *, num_requests: int | None = None) -> Trace:
    """Read a file of Mooncake's, or a folder of sessions as one trace.

    Args:
        path: The file, or the folder.
        num_requests: How many to take from the start; None: all.
    """
    if path.is_dir():
        entries, block_size = _sessions(sorted(path.glob("*.json")))
    else:
        entries, block_size = _mooncake(path), 512
    entries.sort(key=lambda entry: entry.at)
    numbered = _numbered(entries[:num_requests], block_size)
    return Trace(path.stem, block_size, list(numbered))


def _mooncake(path: Path) -> list[Entry]:
    """Read one request a line; its last block may be a part of one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Entry(row["timestamp"], row["input_length"], None, row["hash_ids"])
        for row in rows
    ]


def _sessions(paths: Sequence[Path]) -> tuple[list[Entry], int]:
    """Read one session a file; the last tokens of a prompt are in no block."""
    entries = []
    sizes = {64}
    for i, path in enumerate(paths):
        session = json.loads(path.read_text())
        sizes = {session["block_size"]}
        for row in _rows(session["requests"]):
            at = row["t"] + i * SECONDS_BETWEEN_SESSIONS
            entries.append(Entry(at, row["in"], path.stem, row["hash_ids"]))
    (block_size,) = sizes
    return entries, block_size


def _rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield requests, also those of subagents, whose times are the session's."""
    for row in rows:
        if "requests" in row:
            yield from _rows(row["requests"])
        else:
            yield row


def _numbered(entries: Iterable[Entry], block_size: int) -> Iterator[Request]:
    """Yield requests whose blocks are numbered by what they are and come after.

    What is in no block is taken to be in no other prompt.
    """
    numbers: dict[Hashable, int] = {}
    for i, entry in enumerate(entries):
        blocks: list[int] = []
        names: list[Hashable] = [(entry.scope, hash_id) for hash_id in entry.hash_ids]
        names += [("rest of", i)] * (entry.num_tokens > len(names) * block_size)
        for name in names:
            after = blocks[-1] if blocks else None
            blocks.append(numbers.setdefault((after, name), len(numbers)))
        yield Request(entry.num_tokens, tuple(blocks))
