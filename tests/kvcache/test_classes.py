"""Every cache class of mlx-lm is kept in the way that suits it, or refused by name."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as mlx_cache
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from promptcache import UnsupportedCacheError
from promptcache.kvcache.classes import (
    KINDS,
    LayerKind,
    check_supported,
    kind_of,
    needs_checkpoints,
    parts_of,
    window_rows,
    window_size,
    with_parts,
)


class OwnCache:
    """A cache class of the model below."""

    def __init__(self) -> None:
        self.offset = 0


class OwnKVCache(KVCache):
    """A class that inherits from a known one, and may do something else."""


class Layer(nn.Module):
    """A part of a model."""


class Model(nn.Module):
    """A model with a cache class in its own module."""


class Wrapper(nn.Module):
    """A model whose parts are of other modules."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = list(layers)


# As if it came from a module that defines no cache class.
Wrapper.__module__ = "somewhere.else"


def rows(start: int, end: int) -> mx.array:
    """Return keys that tell their positions."""
    return mx.arange(start, end, dtype=mx.float32).reshape(1, 1, -1, 1)


def positions(array: mx.array) -> list[int]:
    """Return the positions that keys tell."""
    return [int(value) for value in array.reshape(-1).tolist()]


def read(part: Any, start: int, end: int) -> Any:
    """Let a part read tokens as a model does, and return it."""
    if isinstance(part, ChunkedKVCache):
        part.maybe_trim_front()
    part.update_and_fetch(rows(start, end), -rows(start, end))
    return part


def read_at_once(part: Any, num_tokens: int = 5) -> Any:
    return read(part, 0, num_tokens)


def quantized() -> QuantizedKVCache:
    part = QuantizedKVCache(group_size=32, bits=8)
    keys = mx.zeros((1, 1, 5, 32))
    part.update_and_fetch(keys, keys)
    return part


# The table

FILLED: dict[str, tuple[Callable[[], Any], LayerKind]] = {
    "KVCache": (lambda: read_at_once(KVCache()), LayerKind.ROWS),
    "ConcatenateKVCache": (
        lambda: read_at_once(ConcatenateKVCache()),
        LayerKind.ROWS,
    ),
    "QuantizedKVCache": (quantized, LayerKind.ROWS),
    "RotatingKVCache": (lambda: read_at_once(RotatingKVCache(8)), LayerKind.WINDOW),
    "RotatingKVCache that keeps the first tokens": (
        lambda: read_at_once(RotatingKVCache(8, keep=4)),
        LayerKind.CHECKPOINT,
    ),
    "ChunkedKVCache": (lambda: read_at_once(ChunkedKVCache(8)), LayerKind.WINDOW),
    "ArraysCache": (lambda: ArraysCache(2), LayerKind.CHECKPOINT),
    "class of the model": (OwnCache, LayerKind.CHECKPOINT),
    "class that inherits": (
        lambda: read_at_once(OwnKVCache()),
        LayerKind.CHECKPOINT,
    ),
}


@pytest.mark.parametrize("name", FILLED)
def test_part_is_kept_as_its_class_allows(name: str) -> None:
    make_part, kind = FILLED[name]

    assert kind_of(make_part(), 5) is kind


@pytest.mark.parametrize("name", ["KVCache", "RotatingKVCache", "ChunkedKVCache"])
@pytest.mark.parametrize("position", [1, 4, 6, 20])
def test_part_that_counts_tokens_in_its_own_way_is_a_checkpoint(
    name: str, position: int
) -> None:
    make_part, _ = FILLED[name]

    assert kind_of(make_part(), position) is LayerKind.CHECKPOINT


@pytest.mark.parametrize(
    "part",
    [
        KVCache(),
        ConcatenateKVCache(),
        QuantizedKVCache(),
        RotatingKVCache(8),
        RotatingKVCache(8, keep=4),
        ChunkedKVCache(8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_part_that_the_model_did_not_use_is_empty(part: Any) -> None:
    assert kind_of(part, 5) is LayerKind.EMPTY


def test_table_has_every_class_that_a_model_of_mlx_lm_can_return() -> None:
    classes = {
        name
        for name, value in vars(mlx_cache).items()
        if isinstance(value, type) and issubclass(value, mlx_cache._BaseCache)
    }

    others = {"_BaseCache", "CacheList", "BatchKVCache", "BatchRotatingKVCache"}
    assert set(KINDS) == classes - others


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ([KVCache(), ConcatenateKVCache(), QuantizedKVCache()], False),
        ([RotatingKVCache(8), ChunkedKVCache(8)], False),
        ([KVCache(), ArraysCache(2)], True),
        ([CacheList(KVCache(), ArraysCache(2))], True),
        ([KVCache(), OwnCache()], True),
        ([OwnKVCache()], True),
        ([], False),
    ],
)
def test_fresh_cache_tells_whether_rows_are_not_enough(
    cache: list[Any], expected: bool
) -> None:
    assert needs_checkpoints(cache) is expected


# Parts


def test_parts_are_named_by_where_they_are() -> None:
    parts = [KVCache() for _ in range(5)]
    inner = CacheList(parts[2], parts[3])
    cache = [parts[0], CacheList(parts[1], inner), parts[4]]

    named = list(parts_of(cache))

    assert [name for name, _ in named] == ["0", "1.0", "1.1.0", "1.1.1", "2"]
    assert [part for _, part in named] == parts


nested = st.recursive(
    st.builds(KVCache),
    lambda layers: st.lists(layers, min_size=1, max_size=3).map(
        lambda parts: CacheList(*parts)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(st.lists(nested, max_size=4))
def test_parts_come_back_to_where_they_were(cache: list[Any]) -> None:
    before = list(parts_of(cache))
    others = [KVCache() for _ in before]

    changed = with_parts(cache, iter(others))

    names = [name for name, _ in before]
    assert list(parts_of(changed)) == list(zip(names, others, strict=True))
    assert list(parts_of(cache)) == before
    assert [type(layer) for layer in changed] == [type(layer) for layer in cache]


def test_list_of_parts_keeps_its_kind_of_sequence() -> None:
    made, restored = CacheList(KVCache()), CacheList(KVCache())
    restored.caches = list(restored.caches)

    changed = with_parts([made, restored], iter([KVCache(), KVCache()]))

    assert [type(layer.caches) for layer in changed] == [tuple, list]


# Windows


def test_window_looks_back_as_far_as_its_class_says() -> None:
    assert window_size(RotatingKVCache(7)) == 7
    assert window_size(ChunkedKVCache(9)) == 9


PIECES: dict[str, Sequence[int]] = {
    "several tokens before it wraps": [3],
    "one token before it wraps": [1],
    "more tokens than the window": [30],
    "exactly the window": [8],
    "several tokens, then one": [5, 1],
    "one by one across the wrap": [1] * 11,
    "several tokens after single ones": [1, 1, 6],
    "several tokens after it wrapped": [20, 3],
    "one token after it wrapped": [20, 1, 1],
    "several tokens after it wrapped in place": [6, 1, 1, 1, 4],
    "the window's end with one token": [7, 1, 1],
}


@pytest.mark.parametrize("make_part", [RotatingKVCache, ChunkedKVCache])
@pytest.mark.parametrize("name", PIECES)
def test_rows_of_a_piece_are_there_right_after_it(make_part: Any, name: str) -> None:
    part, start = make_part(8), 0
    for num_tokens in PIECES[name]:
        read(part, start, start + num_tokens)

        keys, values = window_rows(part, start, start + num_tokens)

        assert positions(keys) == list(range(start, start + num_tokens))
        assert mx.array_equal(values, -keys)
        start += num_tokens


@pytest.mark.parametrize("num_first", [1, 5, 8, 20])
def test_rows_of_an_answer_are_there_as_long_as_the_window_has_them(
    num_first: int,
) -> None:
    part = read_at_once(RotatingKVCache(8), num_first)
    for end in range(num_first + 1, num_first + 30):
        read(part, end - 1, end)

        for num_rows in range(1, min(end - num_first, 8) + 1):
            keys, values = window_rows(part, end - num_rows, end)
            assert positions(keys) == list(range(end - num_rows, end))
            assert mx.array_equal(values, -keys)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([RotatingKVCache, ChunkedKVCache]),
    st.integers(1, 12),
    st.lists(st.integers(1, 20) | st.just(1), min_size=1, max_size=12),
)
def test_rows_of_any_pieces_are_there_right_after_each(
    make_part: Any, window: int, pieces: list[int]
) -> None:
    part, start = make_part(window), 0
    for num_tokens in pieces:
        read(part, start, start + num_tokens)

        keys, _ = window_rows(part, start, start + num_tokens)

        assert positions(keys) == list(range(start, start + num_tokens))
        start += num_tokens


def test_rows_that_a_window_has_lost_are_not_asked_for() -> None:
    part = read_at_once(RotatingKVCache(8), 20)

    read(part, 20, 21)

    with pytest.raises(AssertionError, match="has lost"):
        window_rows(part, 12, 21)


# What is refused


class UnknownCache(OwnCache):
    """A class that no model below defines."""


UnknownCache.__module__ = "somebody.elses"


class ForeignKVCache(OwnCache):
    """A class that is only called like a known one."""


ForeignKVCache.__name__ = "KVCache"
ForeignKVCache.__module__ = "somebody.elses"


@pytest.mark.parametrize(
    "part",
    [UnknownCache(), ForeignKVCache(), BatchKVCache([0])],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_unknown_class_is_refused_by_name(part: Any, is_nested: bool) -> None:
    layer = CacheList(KVCache(), part) if is_nested else part

    with pytest.raises(UnsupportedCacheError, match=f"class {type(part).__name__} is"):
        check_supported([KVCache(), layer], Model())


@pytest.mark.parametrize(
    "part", [OwnCache(), OwnKVCache()], ids=lambda value: type(value).__name__
)
def test_class_of_the_model_itself_is_accepted(part: Any) -> None:
    check_supported([KVCache(), part], Model())


def test_class_of_a_part_of_the_model_is_accepted() -> None:
    check_supported([OwnCache()], Wrapper(Layer()))

    with pytest.raises(UnsupportedCacheError, match="OwnCache"):
        check_supported([OwnCache()], Wrapper())


def test_classes_of_several_models_are_accepted() -> None:
    check_supported([KVCache(), OwnCache()], Wrapper(), Model())


def test_known_classes_are_accepted_without_a_model() -> None:
    check_supported(
        [KVCache(), RotatingKVCache(8, keep=4), CacheList(ArraysCache(2), KVCache())]
    )
