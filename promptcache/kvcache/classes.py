"""Cache classes: how each of mlx-lm's is kept, and what can be done with it.

    rows        keys and values of every token: a segment keeps those of its range,
                and a run can resume at any token
    window      the same, but the live cache drops the rows that leave its window:
                they are copied when each piece of a prefill is done
    checkpoint  the whole state, good at one position only
    empty       nothing: the model does not use this part

No other module compares names of cache classes. To support a new class, add it to
`KINDS`, to `TRIMMABLE` if mlx-lm can take its last tokens back, and to `tensor_names`
if its rows are in other tensors than `keys` and `values`. A `CacheList` is taken
apart. A class that a model's own modules define is kept as a checkpoint, any other is
refused.
"""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from promptcache.errors import StoreError, UnsupportedCacheError

if TYPE_CHECKING:
    import mlx.core as mx


class LayerKind(StrEnum):
    """How a part of a cache is kept."""

    ROWS = "rows"
    WINDOW = "window"
    CHECKPOINT = "checkpoint"
    EMPTY = "empty"


KINDS = {
    "KVCache": LayerKind.ROWS,
    "ConcatenateKVCache": LayerKind.ROWS,
    "QuantizedKVCache": LayerKind.ROWS,
    # A checkpoint where it keeps the first tokens, as with `max_kv_size`.
    "RotatingKVCache": LayerKind.WINDOW,
    "ChunkedKVCache": LayerKind.WINDOW,
    "ArraysCache": LayerKind.CHECKPOINT,
}
# Classes whose last rows mlx-lm can take back at any length.
TRIMMABLE = {"KVCache", "ConcatenateKVCache", "QuantizedKVCache"}
QUANTIZED = "QuantizedKVCache"
CACHE_MODULE = "mlx_lm.models.cache"
PLAIN_TENSORS = ("keys", "values")
QUANTIZED_TENSORS = tuple(
    f"{name}.{part}"
    for name in PLAIN_TENSORS
    for part in ("weight", "scales", "biases")
)


def parts_of(cache: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a cache with their names: `0`, and `1.0` in a list."""
    for i, layer in enumerate(cache):
        if type(layer).__name__ == "CacheList":
            for name, part in parts_of(layer.caches):
                yield f"{i}.{name}", part
        else:
            yield str(i), layer


def with_parts(cache: Sequence[Any], parts: Iterator[Any]) -> list[Any]:
    """Return a cache with other parts, taken in the order of `parts_of`."""
    layers = []
    for layer in cache:
        if type(layer).__name__ == "CacheList":
            layers.append(copy(layer))
            layers[-1].caches = type(layer.caches)(with_parts(layer.caches, parts))
        else:
            layers.append(next(parts))
    return layers


def check_supported(cache: Sequence[Any], *models: Any) -> None:
    """Raise UnsupportedCacheError if no kind is known for some part's class.

    Args:
        cache: What the models' `make_prompt_cache` returned.
        models: The models it was made for, whose own classes are known to them.
    """
    for _, part in parts_of(cache):
        cls = type(part)
        is_known = cls.__module__ == CACHE_MODULE and cls.__name__ in KINDS
        if not is_known and cls.__module__ not in _modules_of(models):
            raise UnsupportedCacheError(
                f"prefixes of this model cannot be stored: its cache class "
                f"{cls.__name__} is not supported"
            )


def _modules_of(models: Sequence[Any]) -> set[str]:
    """Return the names of the Python modules that define the models' parts."""
    return {type(part).__module__ for model in models for part in model.modules()}


def kind_of(part: Any, position: int) -> LayerKind:
    """Return how to keep a part of a cache that has read `position` tokens.

    What counts tokens in its own way, such as a compressor, is a checkpoint.
    """
    kind = LayerKind.CHECKPOINT
    if type(part).__module__ == CACHE_MODULE:
        kind = KINDS[type(part).__name__]
    if kind is LayerKind.CHECKPOINT:
        return kind
    if part.empty():
        return LayerKind.EMPTY
    if part.offset != position or getattr(part, "keep", 0):
        return LayerKind.CHECKPOINT
    return kind


def needs_checkpoints(cache: Sequence[Any]) -> bool:
    """Return whether a fresh cache has a part that rows alone do not restore."""
    return any(
        type(part).__module__ != CACHE_MODULE
        or KINDS.get(type(part).__name__) is LayerKind.CHECKPOINT
        or getattr(part, "keep", 0)
        for _, part in parts_of(cache)
    )


def is_plain(part: Any) -> bool:
    """Return whether a part keeps one row of keys and values a token, and no more."""
    return type(part).__name__ == "KVCache"


def is_all_plain(cache: Sequence[Any]) -> bool:
    """Return whether all parts are plain, so that rows can be cut at any token."""
    return all(is_plain(part) for _, part in parts_of(cache))


def trim_limit(part: Any) -> float:
    """Return below how many tokens mlx-lm can take the last ones back out of a part."""
    name = type(part).__name__
    if name in TRIMMABLE:
        return math.inf
    return int(part.max_size) if name == "RotatingKVCache" else 0


def tensor_names(part_class: str) -> tuple[str, ...]:
    """Return the names of the tensors in which a class keeps rows."""
    return QUANTIZED_TENSORS if part_class == "QuantizedKVCache" else PLAIN_TENSORS


def arrays_of(part: Any) -> list["mx.array"]:
    """Return a part's arrays in the order of its tensors' names."""
    if type(part).__name__ == "QuantizedKVCache":
        return [*part.keys, *part.values]
    return [part.keys, part.values]


def rows_of(part: Any, start: int, end: int) -> list["mx.array"]:
    """Return the rows `[start, end)` of a part that keeps all of them."""
    assert part.offset >= end, f"it holds [0, {part.offset}), not up to {end}"
    return [array[..., start:end, :] for array in arrays_of(part)]


def window_rows(part: Any, start: int, end: int) -> list["mx.array"]:
    """Return the rows `[start, end)` of a window that still has them.

    After a piece of several tokens, a window holds all of them in temporal order;
    rows that were added one by one go around in it, the newest before `_idx`.
    """
    chunked = type(part).__name__ == "ChunkedKVCache"
    num_rows = part.keys.shape[-2]
    newest = part.offset - part.start_position if chunked else part._idx
    first, stop = newest - (part.offset - start), newest - (part.offset - end)
    least = 0 if chunked else stop - num_rows
    assert first >= least, f"a window of {num_rows} rows has lost [{start}, {end})"
    return [_turned_rows(array, first, stop) for array in arrays_of(part)]


def first_row(part: Any) -> int:
    """Return the first token whose row a window still has."""
    if type(part).__name__ == "ChunkedKVCache":
        return int(part.start_position)
    return max(int(part.offset) - int(part.keys.shape[-2]), 0)


def _turned_rows(array: "mx.array", first: int, stop: int) -> "mx.array":
    """Return the rows `[first, stop)` of a ring, negative ones counted from its end."""
    import mlx.core as mx

    num_rows = array.shape[-2]
    if first >= 0:
        return array[..., first:stop, :]
    if stop <= 0:
        return array[..., num_rows + first : num_rows + stop, :]
    parts = [array[..., num_rows + first :, :], array[..., :stop, :]]
    return mx.concatenate(parts, axis=-2)


def least_window(cache: Sequence[Any]) -> int | None:
    """Return how many tokens the smallest window of a cache looks back, if any."""
    windows = (
        window_size(part)
        for _, part in parts_of(cache)
        if KINDS.get(type(part).__name__) is LayerKind.WINDOW
    )
    return min(windows, default=None)


def window_size(part: Any) -> int:
    """Return how many tokens back a window looks."""
    chunked = type(part).__name__ == "ChunkedKVCache"
    return int(part.chunk_size if chunked else part.max_size)


def turned_by(part: Any) -> int:
    """Return by how many rows a window that has wrapped is out of temporal order.

    The order of rows is the order of a sum, so that its last bits depend on it.
    """
    index = getattr(part, "_idx", 0)
    return 0 if part.keys is None or index == part.keys.shape[-2] else index


def filled_window(
    part: Any, columns: Sequence["mx.array"], position: int, turn: int = 0
) -> Any:
    """Return a fresh window filled with the last rows before a position.

    Args:
        part: The window; it is not modified.
        columns: Keys and values of these rows, in temporal order.
        position: How many tokens have been read.
        turn: By how many rows to turn them.
    """
    import mlx.core as mx

    filled = copy(part)
    filled.keys, filled.values = (mx.roll(c, turn, axis=-2) for c in columns)
    filled.offset = position
    num_rows = filled.keys.shape[-2]
    if type(part).__name__ == "ChunkedKVCache":
        filled.start_position = position - num_rows
    else:
        filled._idx = turn or num_rows
    return filled


def filled_rows(
    part: Any, columns: Sequence[Sequence["mx.array"]], position: int, room: int
) -> Any:
    """Return a fresh part filled with rows.

    Args:
        part: The part; it is not modified.
        columns: For each of its tensors the rows, from the root, in some pieces.
        position: How many rows these are.
        room: For how many tokens in all to allocate.
    """
    filled = copy(part)
    arrays = [_padded(column, part, room) for column in columns]
    if type(part).__name__ == "QuantizedKVCache":
        filled.keys, filled.values = arrays[:3], arrays[3:]
    else:
        filled.keys, filled.values = arrays
    filled.offset = position
    return filled


def filled_in_place(part: Any, arrays: Sequence["mx.array"], position: int) -> Any:
    """Return a fresh part with arrays that have room and hold its rows already."""
    filled = copy(part)
    filled.keys, filled.values = arrays
    filled.offset = position
    return filled


def _padded(rows: Sequence["mx.array"], part: Any, room: int) -> "mx.array":
    """Join rows and pad them to a multiple of the class's step that has `room`."""
    import mlx.core as mx

    num_rows = sum(array.shape[-2] for array in rows)
    # ConcatenateKVCache has no step: it holds exactly its rows.
    step = getattr(part, "step", None)
    if step is None:
        return mx.concatenate(list(rows), axis=-2)
    capacity = math.ceil(max(room, num_rows) / step) * step
    shape = (*rows[0].shape[:-2], capacity - num_rows, rows[0].shape[-1])
    return mx.concatenate([*rows, mx.zeros(shape, rows[0].dtype)], axis=-2)


def quantized_rows(
    rows: Sequence["mx.array"], group_size: int, bits: int
) -> list["mx.array"]:
    """Return keys and values quantized, in the order of `QUANTIZED_TENSORS`.

    Raises StoreError.
    """
    import mlx.core as mx

    try:
        return [
            part
            for array in rows
            for part in mx.quantize(array, group_size=group_size, bits=bits)
        ]
    except ValueError as error:
        raise StoreError(f"rows cannot be quantized ({error})") from error


# By the name of a part, its keys and values.
Rows = dict[str, list[Any]]


def row_parts(cache: Sequence[Any]) -> Iterator[Any]:
    """Yield the parts that keep plain rows and have some."""
    for _, part in parts_of(cache):
        if is_plain(part) and not part.empty():
            yield part


def has_only_rows(cache: Sequence[Any]) -> bool:
    """Return whether a cache is nothing but plain rows of the same tokens."""
    parts = [part for _, part in parts_of(cache)]
    position = max((part.offset for part in row_parts(cache)), default=0)
    return position > 0 and all(
        is_plain(part) and kind_of(part, position) in (LayerKind.ROWS, LayerKind.EMPTY)
        for part in parts
    )


def frozen(cache: Sequence[Any]) -> list[Any]:
    """Return a cache that keeps its rows when another one with its arrays reads on.

    Writing to an array of mlx makes another one, and copies what is still in use.
    """
    return with_parts(cache, (copy(part) for _, part in parts_of(cache)))


def evaluate(cache: Sequence[Any]) -> None:
    """Compute the arrays of a cache, so that another thread can go on with it."""
    import mlx.core as mx

    mx.eval([part.state for _, part in parts_of(cache) if not part.empty()])


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
