"""Identities: what a model in memory computes with.

A model has one identity, in whatever way it was loaded: the content of its arrays, what
its modules keep as plain attributes, its arguments and its code. An adapter and a
quantization of the weights are in there. Where it came from is not.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

from promptcache.errors import ModelError, warn
from promptcache.kvcache.classes import parts_of
from promptcache.models.identity.array_digests import ArrayDigests
from promptcache.models.identity.module_tree import (
    ModuleTree,
    Snapshot,
    describe,
    plain,
)
from promptcache.models.identity.source import hash_implementation
from promptcache.segments.fingerprint import hash_json

SCALARS = bool | int | float | str


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a model is, apart from how a run uses it.

    Attributes:
        name: Its name for people.
        source: The folder or hub repository it came from, or None.
        parts: The parts of a fingerprint that come from the model.
        snapshot: What the model consisted of then. Without it, it is taken for
            unchanged.
    """

    name: str
    source: str | None
    parts: Mapping[str, str]
    snapshot: Snapshot | None = field(default=None, compare=False, repr=False)


class IdentifiedModel:
    """A model in memory, and what it is now, also after it has changed."""

    def __init__(
        self,
        model: Any,
        identity: ModelIdentity | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """Take a model.

        Args:
            model: A model of mlx-lm.
            identity: What it is, if known; else it is hashed on first use.
            announce: Called with a line for people when hashing takes long, else it is
                a warning.
        """
        self.model = model
        self._identity = identity
        self._is_stale = identity is None
        self._digests = ArrayDigests(announce or warn)
        self._lock = threading.Lock()

    @property
    def identity(self) -> ModelIdentity:
        """Return what the model is now.

        What has not been identified, or has changed since, is hashed. Raises ModelError
        if it cannot be.
        """
        with self._lock:
            if self._identity is None or not self.is_current():
                self._identity = self._identified()
                self._is_stale = False
            return self._identity

    def is_current(self) -> bool:
        """Return whether it is known what it is, and nothing has changed since."""
        if self._is_stale or self._identity is None:
            return False
        snapshot = self._identity.snapshot
        return snapshot is None or snapshot.is_of(self.model)

    def refresh(self) -> None:
        """Have it hashed again, as arrays may have been changed in place."""
        with self._lock:
            self._is_stale = True
            self._digests.forget()

    def _identified(self) -> ModelIdentity:
        before = self._identity
        try:
            tree = describe(self.model)
            parts = parts_of_tree(self.model, tree)
            weights = None if self._is_stale else _weights_of_same(before, tree)
            weights = weights or _hash_arrays(tree, self._digests)
        # mlx raises RuntimeError where memory is short, or the thread is another one.
        except (RuntimeError, MemoryError, ValueError) as error:
            raise ModelError(f"the model cannot be identified: {error}") from error
        identity = make_identity(self.model, tree, {"weights": weights, **parts})
        if before is None:
            return identity
        return replace(identity, name=before.name, source=before.source)


def _weights_of_same(identity: ModelIdentity | None, tree: ModuleTree) -> str | None:
    """Return the hash of the weights if only what is around them has changed."""
    if identity is None or identity.snapshot is None:
        return None
    same = identity.snapshot.has_arrays(tree.arrays)
    return identity.parts["weights"] if same else None


def identify(
    model: Any, announce: Callable[[str], None] | None = None
) -> ModelIdentity:
    """Identify a model by what it consists of. Raises ModelError if that fails."""
    return IdentifiedModel(model, announce=announce).identity


def make_identity(
    model: Any, tree: ModuleTree, parts: Mapping[str, str]
) -> ModelIdentity:
    """Return the identity of a model that came from no known folder."""
    arguments = getattr(model, "args", None)
    name = str(getattr(arguments, "model_type", type(model).__module__))
    return ModelIdentity(name, None, parts, Snapshot(model, tree.arrays))


def parts_of_tree(model: Any, tree: ModuleTree) -> dict[str, str]:
    """Return all parts of a model's identity but the content of its weights."""
    return {
        "config": hash_json(plain(getattr(model, "args", None))),
        "modules": hash_json(tree.attributes),
        "implementation": _implementation(tree.classes),
        "dtype": ",".join(sorted({str(a.dtype) for a in tree.arrays.values()})),
    }


def hash_weights(
    tree: ModuleTree, announce: Callable[[str], None] | None = None
) -> str:
    """Return the hash of a model's arrays. Raises ModelError if that fails."""
    try:
        return _hash_arrays(tree, ArrayDigests(announce or warn))
    except (RuntimeError, MemoryError, ValueError) as error:
        raise ModelError(f"the model cannot be identified: {error}") from error


def _hash_arrays(tree: ModuleTree, digests: ArrayDigests) -> str:
    """Return a hash over the names, dtypes, shapes and bytes of a model's arrays."""
    arrays = sorted(tree.arrays.items())
    content = digests.of(array for _, array in arrays)
    return hash_json(
        [
            [path, str(array.dtype), array.shape, digest.hex()]
            for (path, array), digest in zip(arrays, content, strict=True)
        ]
    )


def _implementation(classes: Iterable[type]) -> str:
    """Return the hash of the code of a model's modules, but for MLX's own layers."""
    files: dict[str, str | None] = {}
    for cls in classes:
        if not cls.__module__.startswith("mlx."):
            files[cls.__module__] = files.get(cls.__module__) or _file_of(cls)
    return hash_implementation(files)


def _file_of(cls: type) -> str | None:
    """Return the file that a class was defined in, None if that is not known."""
    if module := sys.modules.get(cls.__module__):
        return getattr(module, "__file__", None)
    # A folder's own source, which mlx-lm runs without making it a module.
    functions = (f for f in vars(cls).values() if isinstance(f, FunctionType))
    return next((function.__code__.co_filename for function in functions), None)


def hash_layout(cache: Sequence[Any]) -> str:
    """Return a hash over the classes and the plain attributes of a fresh cache."""
    return hash_json(
        [
            [
                name,
                type(part).__name__,
                *(
                    f"{attribute}={value!r}"
                    for attribute, value in sorted(vars(part).items())
                    if isinstance(value, SCALARS)
                ),
            ]
            for name, part in parts_of(cache)
        ]
    )
