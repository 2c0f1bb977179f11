"""States: a cache object's attributes as JSON and arrays, and back.

Nothing is ever constructed from what a file says. A state is put into a copy of an
object that the loaded model made: its classes and its attributes' names are the
allow-list.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from promptcache.errors import DamagedBlobError, UnsupportedCacheError
from promptcache.kvcache.classes import parts_of

if TYPE_CHECKING:
    import mlx.core as mx

SCALARS = (bool, int, float, str)


def take_state(part: Any, name: str) -> tuple[Any, dict[str, "mx.array"]]:
    """Return an object's attributes as JSON, and the arrays that it names.

    The arrays are new objects on the same memory, so that they keep their values when
    the cache goes on.

    Args:
        part: A cache object of mlx-lm or of the model's own module.
        name: What the names of the arrays begin with.

    Raises:
        UnsupportedCacheError: It holds something else than arrays, numbers, text and
            lists or objects of these.
    """
    arrays: dict[str, mx.array] = {}
    return _taken(part, name, arrays), arrays


def _taken(value: Any, name: str, arrays: dict[str, "mx.array"]) -> Any:
    import mlx.core as mx

    if value is None or isinstance(value, SCALARS):
        return value
    if isinstance(value, mx.array):
        arrays[name] = copy(value)
        return {"array": name}
    if isinstance(value, (list, tuple)):
        items = [_taken(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
        return {type(value).__name__: items}
    if not hasattr(value, "__dict__"):
        raise UnsupportedCacheError(
            f"prefixes of this model cannot be stored: its cache holds a "
            f"{type(value).__name__}"
        )
    attributes = {
        key: _taken(attribute, f"{name}.{key}", arrays)
        for key, attribute in _unpadded(value).items()
    }
    return {"object": type(value).__name__, "attributes": attributes}


def _unpadded(part: Any) -> dict[str, Any]:
    """Return the attributes, without rows that were allocated and not yet filled."""
    attributes = dict(vars(part))
    keys, offset = attributes.get("keys"), attributes.get("offset")
    if not isinstance(offset, int) or not hasattr(keys, "shape"):
        return attributes
    num_rows = offset - attributes.get("start_position", 0)
    if keys is not None and num_rows < keys.shape[-2]:
        for name in ("keys", "values"):
            attributes[name] = attributes[name][..., :num_rows, :]
    return attributes


def put_state(part: Any, state: Any, arrays: Mapping[str, "mx.array"]) -> Any:
    """Return a copy of a fresh cache object with a state that was taken.

    Raises:
        DamagedBlobError: The state is of another class, or does not fit this one.
    """
    if not isinstance(state, dict) or set(state) != {"object", "attributes"}:
        raise DamagedBlobError("blob lacks the state of a part")
    try:
        return _put_object(part, state, arrays)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedBlobError(f"state cannot be read ({error!r})") from error


def _put(fresh: Any, state: Any, arrays: Mapping[str, "mx.array"]) -> Any:
    if not isinstance(state, dict):
        return state
    kinds = set(state)
    if kinds == {"array"}:
        return arrays[state["array"]]
    if kinds == {"object", "attributes"}:
        return _put_object(fresh, state, arrays)
    if kinds not in ({"list"}, {"tuple"}):
        raise DamagedBlobError("blob holds a state of an unknown kind")
    defaults = fresh if isinstance(fresh, (list, tuple)) else ()
    items = [
        _put(defaults[i] if i < len(defaults) else None, item, arrays)
        for i, item in enumerate(*state.values())
    ]
    return tuple(items) if kinds == {"tuple"} else items


def _put_object(
    fresh: Any, state: Mapping[str, Any], arrays: Mapping[str, "mx.array"]
) -> Any:
    if type(fresh).__name__ != state["object"]:
        raise DamagedBlobError(f"blob holds the state of a {state['object']!r}")
    attributes = state["attributes"]
    if attributes.keys() - vars(fresh).keys():
        raise DamagedBlobError("blob names attributes that the class does not have")
    filled = copy(fresh)
    for key, value in attributes.items():
        setattr(filled, key, _put(getattr(fresh, key), value, arrays))
    return filled


def positions_of(cache: Sequence[Any]) -> Iterator[int]:
    """Yield how many tokens each part has read that has read some, and says so."""
    for _, part in parts_of(cache):
        if hasattr(part, "offset") and not part.empty():
            yield int(part.offset)
