"""Caches of plain rows, such as `KVCache`'s: trimmed, copied and shared."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from promptcache.treatment import (
    Treatment,
    filled_rows,
    parts_of,
    rows_of,
    treatment_of,
    with_parts,
)

# By the name of a part, its keys and values.
Rows = dict[str, list[Any]]


def row_parts(cache: Sequence[Any]) -> Iterator[Any]:
    """Yield the parts that keep plain rows and have some."""
    for _, part in parts_of(cache):
        if type(part).__name__ == "KVCache" and not part.empty():
            yield part


def has_only_rows(cache: Sequence[Any]) -> bool:
    """Return whether a cache is nothing but plain rows of the same tokens."""
    parts = [part for _, part in parts_of(cache)]
    position = max((part.offset for part in row_parts(cache)), default=0)
    return position > 0 and all(
        type(part).__name__ == "KVCache"
        and treatment_of(part, position) in (Treatment.ROWS, Treatment.EMPTY)
        for part in parts
    )


def trim(cache: Sequence[Any], num_tokens: int) -> None:
    """Cut a cache to its first tokens."""
    for part in row_parts(cache):
        part.trim(part.offset - num_tokens)


def copied_rows(cache: Sequence[Any], start: int, stop: int) -> Rows:
    """Return copies of the rows `[start, stop)` of every part that has rows."""
    import mlx.core as mx

    rows = {
        name: [mx.contiguous(array) for array in rows_of(part, start, stop)]
        for name, part in parts_of(cache)
        if not part.empty()
    }
    mx.eval(rows)
    return rows


def copied_cache(cache: Sequence[Any], num_tokens: int) -> list[Any]:
    """Return a cache of its own with the first tokens of another one."""
    import mlx.core as mx

    def copied(part: Any) -> Any:
        if part.empty():
            return copy(part)
        columns = [[array] for array in rows_of(part, 0, num_tokens)]
        return filled_rows(type(part)(), columns, num_tokens, num_tokens)

    parts = [copied(part) for _, part in parts_of(cache)]
    mx.eval([part.state for part in parts if not part.empty()])
    return with_parts(cache, iter(parts))


def shared_rows(cache: Sequence[Any], num_tokens: int) -> list[Any]:
    """Return a cache with the first tokens of another one, on the same memory.

    All of its parts keep plain rows. Its arrays are other objects, so that it can be
    written to.
    """

    def shared(part: Any) -> Any:
        other = copy(part)
        if not part.empty():
            other.keys, other.values = rows_of(part, 0, num_tokens)
            other.offset = num_tokens
        return other

    return with_parts(cache, (shared(part) for _, part in parts_of(cache)))
