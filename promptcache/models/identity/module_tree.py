"""Module trees: what a model in memory consists of, and whether that has changed.

Everything that a module keeps counts: its class, its arrays and its plain attributes.
"""

import contextlib
import dis
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from numbers import Number
from operator import call, is_
from types import FunctionType, SimpleNamespace
from typing import Any, cast
from weakref import ref

import xxhash

# What `train` and `freeze` set, which changes no value of a model that generates.
NEUTRAL_ATTRIBUTES = frozenset({"_no_grad", "_training"})
# Modules whose arrays the model itself replaces whenever it runs, by the same values in
# float32: by the class that has them, their names.
REPLACED_MODULES = {"Gemma3nAltUp": {"prediction_coefs", "correction_coefs"}}
# Keys of a model's arguments that name things and change no value.
NEUTRAL_ARGUMENTS = {"_name_or_path", "transformers_version", "eos_token_id"}


@dataclass(frozen=True, slots=True)
class ModuleTree:
    """What a model consists of.

    Attributes:
        arrays: Its arrays by their paths.
        attributes: By path, the classes of its modules and their plain attributes, as
            JSON that is the same in every process.
        classes: The classes of its modules.
    """

    arrays: Mapping[str, Any]
    attributes: Mapping[str, Any]
    classes: frozenset[type]


def describe(model: Any) -> ModuleTree:
    """Return what a model consists of. The order of its modules does not matter."""
    import mlx.core as mx
    from mlx.nn import Module

    arrays: dict[str, Any] = {}
    attributes: dict[str, Any] = {"()": name_of(type(model))}
    classes: set[type] = {type(model)}
    pending: list[tuple[str, Any]] = [("", root_of(model))]
    while pending:
        path, value = pending.pop()
        if isinstance(value, mx.array):
            arrays[path] = value
        elif isinstance(value, Module):
            classes.add(type(value))
            attributes[path] = name_of(type(value))
            replaced = _replaced(value)
            attributes |= {f"{path}.{n}": _values(value[n]) for n in replaced}
            pending += [
                (f"{path}.{name}", member)
                for name, member in _members(value).items()
                if name not in replaced
            ]
        elif isinstance(value, dict):
            attributes[path] = len(value)
            pending += [(f"{path}[{key!r}]", v) for key, v in value.items()]
        elif isinstance(value, list | tuple):
            attributes[path] = len(value)
            pending += [(f"{path}[{i}]", v) for i, v in enumerate(value)]
        else:
            attributes[path] = plain(value)
    return ModuleTree(arrays, attributes, frozenset(classes))


def root_of(model: Any) -> Any:
    """Return the module that a model is, or wraps.

    Raises ValueError if that is none of MLX's.
    """
    from mlx.nn import Module

    if isinstance(model, Module):
        return model
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        wrapped = dict(model.named_modules()).get("")
        if isinstance(wrapped, Module):
            return wrapped
    raise ValueError(f"{name_of(type(model))} is no module of MLX")


def name_of(value: Any) -> str:
    """Return the name of a class or function, with that of its module."""
    return f"{value.__module__}.{value.__qualname__}"


def _members(module: Any) -> dict[str, Any]:
    """Return what a module keeps, but for what it only notes while it runs."""
    members = {**vars(module), **module}
    hidden, cls = NEUTRAL_ATTRIBUTES, cast(Hashable, type(module))
    if any(name[0] == "_" for name in members.keys() - hidden):
        hidden |= _noted_by(cls)
    return {name: value for name, value in members.items() if name not in hidden}


def _replaced(module: Any) -> set[str]:
    """Return the names of modules in it whose arrays count by their values only."""
    names = REPLACED_MODULES.get(type(module).__name__, set())
    return {name for name in names if name in module}


def _values(module: Any) -> Any:
    """Return the values of a small module's arrays, in whatever dtype they are."""
    import mlx.core as mx
    import numpy as np

    return plain({k: np.array(v.astype(mx.float32)) for k, v in module.items()})


@cache
def _noted_by(cls: Any) -> frozenset[str]:
    """Return the private attributes that a class sets outside of its constructor.

    Models keep there what follows from their arrays, or a function compiled for them.
    """
    functions = [
        getattr(member, "fget", member)
        for base in cls.__mro__
        for name, member in vars(base).items()
        if name != "__init__"
    ]
    return frozenset(
        instruction.argval
        for function in functions
        if isinstance(function, FunctionType)
        for instruction in dis.get_instructions(function)
        if instruction.opname == "STORE_ATTR" and instruction.argval[0] == "_"
    )


def plain(value: Any) -> Any:
    """Return a value as JSON that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Enum):
        return [name_of(type(value)), value.name]
    if isinstance(value, Mapping):
        counted = {k: v for k, v in value.items() if k not in NEUTRAL_ARGUMENTS}
        return sorted(([repr(k), plain(v)] for k, v in counted.items()), key=repr)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=repr)
    if is_arguments(value):
        return [name_of(type(value)), plain(vars(value))]
    if hasattr(value, "tobytes"):
        digest = xxhash.xxh3_128_hexdigest(value.tobytes())
        return [str(value.dtype), list(value.shape), digest]
    if isinstance(value, Number) or type(value).__name__ == "Dtype":
        return repr(value)
    return name_of(value if hasattr(value, "__qualname__") else type(value))


def is_arguments(value: Any) -> bool:
    """Return whether a value is an object that only holds others."""
    is_record = is_dataclass(value) and hasattr(value, "__dict__")
    return not isinstance(value, type) and (
        is_record or isinstance(value, SimpleNamespace)
    )


class Snapshot:
    """What a model consisted of at one moment, to be compared with what it is now.

    Comparing takes less than a millisecond, as no array is looked at: it notices
    arrays, modules and plain attributes that were replaced, but not an array that was
    changed in place.

    Invariants:
        It keeps no array and no module alive.
    """

    def __init__(self, model: Any, arrays: Mapping[str, Any]) -> None:
        modules, containers = _nodes(root_of(model))
        keys, values = _contents(modules, containers)
        self._modules = [ref(module) for module in modules]
        self._containers = containers
        self._keys = keys
        self._values = [_reference(value) for value in values]
        self._classes = [type(module) for module in modules]
        self._attributes = [dict(vars(module)) for module in modules]
        self._arguments = [(a, _copied(vars(a))) for a in _arguments(modules)]
        self._arrays = {path: ref(array) for path, array in arrays.items()}

    def is_of(self, model: Any) -> bool:
        """Return whether a model consists of the same objects still."""
        modules: list[Any] = [*map(call, self._modules)]
        try:
            return modules[0] is root_of(model) and self._has(modules)
        # A module that is gone, or attributes that cannot be compared.
        except Exception:
            return False

    def _has(self, modules: list[Any]) -> bool:
        keys, values = _contents(modules, self._containers)
        return (
            keys == self._keys
            and len(values) == len(self._values)
            and all(map(is_, values, map(call, self._values)))
            and [*map(type, modules)] == self._classes
            and [*map(vars, modules)] == self._attributes
            and all(vars(object_) == copy for object_, copy in self._arguments)
        )

    def has_arrays(self, arrays: Mapping[str, Any]) -> bool:
        """Return whether a model had these very arrays, at the same paths."""
        return arrays.keys() == self._arrays.keys() and all(
            self._arrays[path]() is array for path, array in arrays.items()
        )


def _nodes(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the modules of a model, itself first, and the containers in them."""
    from mlx.nn import Module

    modules: list[Any] = []
    containers: list[Any] = []
    nodes = [model]
    for node in nodes:
        is_module = isinstance(node, Module)
        (modules if is_module else containers).append(node)
        hidden = _replaced(node) if is_module else ()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        nodes.extend(
            v
            for k, v in items
            if k not in hidden and isinstance(v, dict | list | tuple)
        )
    return modules, containers


def _contents(
    modules: Iterable[Any], containers: Iterable[Any]
) -> tuple[list[Any], list[Any]]:
    """Return the keys and values of all of them, one after the other."""
    keys: list[Any] = []
    values: list[Any] = []
    for module in modules:
        keys += module
        values += module.values()
    for container in containers:
        if isinstance(container, dict):
            keys += container
            values += container.values()
        else:
            values += container
    return keys, values


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return ref(value)
    except TypeError:
        return lambda: value


def _arguments(modules: Iterable[Any]) -> Iterable[Any]:
    """Return the objects that hold the arguments of modules, each once."""
    objects = (value for module in modules for value in vars(module).values())
    return {id(o): o for o in objects if is_arguments(o)}.values()


def _copied(value: Any) -> Any:
    """Return a copy of plain data, which may be changed in place."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
