"""A state comes back as it was, into objects that the model made and no others."""

import json
from collections.abc import Callable
from copy import copy
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from promptcache import DamagedBlobError, UnsupportedCacheError
from promptcache.kvcache.state import put_state, take_state


class Pool:
    """What a cache class of a model may hold."""

    def __init__(self) -> None:
        self.rows: mx.array | None = None
        self.num_closed = 0


class OwnCache:
    """A cache class of a model."""

    made = 0

    def __init__(self, size: int = 3) -> None:
        type(self).made += 1
        self.size = size
        self.offset = 0
        self.ratio = 0.5
        self.name = "fresh"
        self.is_open = True
        self.nothing = None
        self.pool = Pool()
        self.pair: tuple[Any, ...] = (None, None)
        self.pools: list[Any] = [Pool(), Pool()]


class Slotted:
    """An object without attributes that anybody could list."""

    __slots__ = ("value",)


def restored(part: Any, fresh: Any) -> Any:
    """Return a fresh object with the state of a part, which went through JSON."""
    state, arrays = take_state(part, "layers.0.state")
    assert all(name.startswith("layers.0.state.") for name in arrays)
    return put_state(fresh, json.loads(json.dumps(state)), arrays)


def plain(value: Any) -> Any:
    """Return a value with lists in place of arrays, and dicts in place of objects."""
    if isinstance(value, mx.array):
        return [str(value.dtype), value.shape, value.tolist()]
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if hasattr(value, "__dict__"):
        return {key: plain(item) for key, item in vars(value).items()}
    return value


def rows(start: int, end: int) -> mx.array:
    """Return keys that tell their positions."""
    return mx.arange(start, end, dtype=mx.float32).reshape(1, 1, -1, 1)


def read(part: Any, start: int, end: int) -> Any:
    part.update_and_fetch(rows(start, end), -rows(start, end))
    return part


def filled_arrays(*values: Any) -> ArraysCache:
    part = ArraysCache(len(values))
    for i, value in enumerate(values):
        part[i] = value
    return part


def filled_own() -> OwnCache:
    part = OwnCache()
    part.offset, part.ratio, part.name, part.is_open = 7, 1e-9, 'a\n"é', False
    part.pool.rows, part.pool.num_closed = mx.arange(6).reshape(2, 3), 2
    part.pair = (mx.array(1.5), None)
    part.pools[1].rows = mx.zeros((0, 4))
    return part


# Round trip

PARTS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "arrays": (
        lambda: filled_arrays(mx.arange(5), mx.ones((2, 3), mx.bfloat16)),
        lambda: ArraysCache(2),
    ),
    "arrays and None": (
        lambda: filled_arrays(None, mx.arange(5), None),
        lambda: ArraysCache(3),
    ),
    "nothing but None": (lambda: ArraysCache(2), lambda: ArraysCache(2)),
    "array without elements": (
        lambda: filled_arrays(mx.zeros((1, 0, 4)), mx.zeros((0,), mx.uint32)),
        lambda: ArraysCache(2),
    ),
    "array without axes": (lambda: filled_arrays(mx.array(3)), lambda: ArraysCache(1)),
    "tuple in a list": (
        lambda: filled_arrays((mx.arange(2), None, (mx.arange(3),)), [1, "x"]),
        lambda: ArraysCache(2),
    ),
    "class of a model": (filled_own, OwnCache),
    "class of a model, unused": (OwnCache, OwnCache),
    "rows of KVCache": (lambda: read(KVCache(), 0, 256), KVCache),
}


@pytest.mark.parametrize("name", PARTS)
def test_state_comes_back_as_it_was(name: str) -> None:
    make_part, make_fresh = PARTS[name]
    part = make_part()

    found = restored(part, make_fresh())

    assert type(found) is type(part)
    assert plain(found) == plain(part)


def test_fresh_object_and_what_it_holds_stay_as_they_are() -> None:
    fresh = OwnCache()
    before = plain(fresh)

    found = restored(filled_own(), fresh)

    assert plain(fresh) == before
    assert found.pool is not fresh.pool
    assert found.pools[1] is not fresh.pools[1]


def test_putting_a_state_constructs_nothing() -> None:
    part, fresh = filled_own(), OwnCache()
    made = OwnCache.made

    restored(part, fresh)

    assert OwnCache.made == made


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.integers(0, 3).map(lambda length: mx.arange(length)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(values, min_size=1, max_size=3))
def test_any_lists_of_values_come_back_as_they_were(held: list[Any]) -> None:
    found = restored(filled_arrays(*held), ArraysCache(len(held)))

    assert plain(found.cache) == plain(held)


# Windows that keep the first tokens

STEPS = {
    "before it wraps": [5],
    "before it wraps, one by one": [1] * 5,
    "at the wrap": [10],
    "one token after the wrap": [10, 1],
    "one by one after the wrap": [10] + [1] * 9,
    "in one piece after the wrap": [25],
    "in pieces after the wrap": [7, 8, 9],
    "in pieces, then one by one": [25, 1, 1, 1],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rest", [[1, 1, 1], [3], [1, 4, 1], [12]], ids=str)
def test_window_that_keeps_the_first_tokens_goes_on_as_it_would_have(
    name: str, rest: list[int]
) -> None:
    part, position = RotatingKVCache(10, keep=4), 0
    for num_tokens in STEPS[name]:
        read(part, position, position + num_tokens)
        position += num_tokens

    found = restored(part, RotatingKVCache(10, keep=4))

    for num_tokens in rest:
        keys = rows(position, position + num_tokens)
        wanted = part.update_and_fetch(keys, -keys)
        taken = found.update_and_fetch(keys, -keys)
        assert all(
            mx.array_equal(left, right)
            for left, right in zip(taken, wanted, strict=True)
        )
        position += num_tokens
    assert (found.offset, found._idx) == (part.offset, part._idx)


def test_rows_that_are_not_filled_yet_are_not_stored() -> None:
    window = RotatingKVCache(1000, keep=4)
    for position in range(5):
        read(window, position, position + 1)
    trimmed = read(KVCache(), 0, 9)
    trimmed.trim(2)

    for part, num_rows in ((window, 5), (trimmed, 7)):
        _, arrays = take_state(part, "x")
        assert part.keys.shape[-2] == 256
        assert {array.shape[-2] for array in arrays.values()} == {num_rows}


# The cache goes on


@pytest.mark.parametrize("steps", [[1], [3], [1, 1, 5], [20]], ids=str)
def test_taken_arrays_keep_their_values_when_the_cache_goes_on(
    steps: list[int],
) -> None:
    part = RotatingKVCache(6, keep=2)
    for position in range(9):
        read(part, position, position + 1)
    before = plain(part)
    state, arrays = take_state(part, "x")

    position = 9
    for num_tokens in steps:
        read(part, position, position + num_tokens)
        position += num_tokens

    found = put_state(RotatingKVCache(6, keep=2), state, arrays)
    assert plain(part) != before
    assert plain(found) == before


def test_array_that_is_written_in_place_keeps_its_values() -> None:
    part = filled_arrays(mx.arange(5))
    _, arrays = take_state(part, "x")

    part[0][1:3] = 99
    part[0] += 1

    assert [array.tolist() for array in arrays.values()] == [[0, 1, 2, 3, 4]]


# What cannot be taken


@pytest.mark.parametrize(
    "value",
    [Slotted(), {1, 2}, {"a": 1}, b"bytes", 1j, len],
    ids=lambda value: type(value).__name__,
)
def test_value_that_no_file_can_hold_is_refused_by_its_type(value: Any) -> None:
    part = filled_arrays(mx.arange(2), [value])

    with pytest.raises(UnsupportedCacheError, match=f"holds a {type(value).__name__}$"):
        take_state(part, "x")


# What cannot be put back

NO_OBJECT: list[Any] = [
    None,
    [],
    {},
    5,
    "ArraysCache",
    {"attributes": {}},
    {"list": []},
    {"array": "x.cache.0"},
]


@pytest.mark.parametrize("state", NO_OBJECT, ids=repr)
def test_state_of_no_object_is_damage(state: Any) -> None:
    with pytest.raises(DamagedBlobError, match="lacks the state"):
        put_state(ArraysCache(1), state, {"x.cache.0": mx.arange(3)})


def arrays_state(**attributes: Any) -> dict[str, Any]:
    return {"object": "ArraysCache", "attributes": attributes}


GARBAGE: dict[str, Any] = {
    "another class": {"object": "KVCache", "attributes": {}},
    "a class of Python": {"object": "dict", "attributes": {}},
    "a path to a class": {"object": "os.system", "attributes": {}},
    "a class that is no text": {"object": 5, "attributes": {}},
    "no class": {"object": None, "attributes": {}},
    "an unknown attribute": arrays_state(evil=1),
    "a method": arrays_state(advance=1),
    "a property": arrays_state(nbytes=1),
    "the class itself": arrays_state(__class__="KVCache"),
    "no attributes": {"object": "ArraysCache"},
    "attributes that are none": {"object": "ArraysCache", "attributes": None},
    "attributes in a list": {"object": "ArraysCache", "attributes": ["cache"]},
    "a missing array": arrays_state(cache={"list": [{"array": "missing"}]}),
    "an array without a name": arrays_state(cache={"list": [{"array": None}]}),
    "an array named by a list": arrays_state(cache={"list": [{"array": ["x"]}]}),
    "a list that is a number": arrays_state(cache={"list": 5}),
    "an object that is a list, too": {**arrays_state(), "list": []},
    "an object that is a tuple, too": {**arrays_state(), "tuple": []},
    "an object that is an array, too": {**arrays_state(), "array": "x"},
    "an empty value": arrays_state(cache={}),
    "an unknown kind": arrays_state(cache={"set": [1]}),
    "an object where there is none": arrays_state(
        cache={"list": [{"object": "Pool", "attributes": {}}]}
    ),
    "None as an object": arrays_state(
        cache={"list": [{"object": "NoneType", "attributes": {"x": 1}}]}
    ),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_state_that_does_not_fit_is_damage(name: str) -> None:
    fresh = ArraysCache(1)
    before = copy(vars(fresh))

    with pytest.raises(DamagedBlobError):
        put_state(fresh, GARBAGE[name], {"x": mx.arange(3)})

    assert vars(fresh) == before


def test_state_of_another_class_is_damage_that_names_it() -> None:
    state, arrays = take_state(filled_own(), "x")

    with pytest.raises(DamagedBlobError, match="state of a 'OwnCache'"):
        put_state(ArraysCache(2), state, arrays)


def test_object_of_another_class_inside_is_damage() -> None:
    state, arrays = take_state(filled_own(), "x")
    fresh = OwnCache()
    fresh.pools[1] = KVCache()

    with pytest.raises(DamagedBlobError, match="state of a 'Pool'"):
        put_state(fresh, state, arrays)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["array", "list", "tuple", "object", "attributes", "x"]),
            inner | st.sampled_from(["ArraysCache", "cache", "lengths", "x"]),
            max_size=3,
        )
    ),
    max_leaves=10,
)


@settings(deadline=None, max_examples=200)
@given(json_values, st.booleans())
def test_any_garbage_is_damage_or_plain_values(garbage: Any, is_inside: bool) -> None:
    state = arrays_state(cache=garbage) if is_inside else garbage

    try:
        found = put_state(ArraysCache(1), state, {"x": mx.arange(3)})
    except DamagedBlobError:
        return

    assert type(found) is ArraysCache
    assert vars(found).keys() == vars(ArraysCache(1)).keys()
