"""Syncing: make the store hold what a manifest names, planned first."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from promptcache.engine.build import BuiltPrefix
from promptcache.errors import PromptCacheError, UsageError
from promptcache.generator import CachedGenerator
from promptcache.project.manifest import Manifest, PromptSpec
from promptcache.prompts.render import RenderedPrompt
from promptcache.store import PrefixStore
from promptcache.store.index.rows import PrefixRow

Action = Literal["keep", "build", "pin", "unpin"]
Build = Callable[[CachedGenerator, RenderedPrompt, PromptSpec], BuiltPrefix]


@dataclass(frozen=True, slots=True)
class SyncStep:
    """What to do for one prompt.

    Attributes:
        name: The prompt's name.
        action: Nothing, read and save it, name it, or take its name away.
        key: The prefix it is about, or None as long as there is none.
        reason: Why.
    """

    name: str
    action: Action
    key: str | None
    reason: str

    @property
    def is_stale(self) -> bool:
        """Return whether there is something to do."""
        return self.action != "keep"


class _Status(NamedTuple):
    """A prompt's key, and the reason to build it, or None."""

    key: str
    build_reason: str | None


class SyncPlanner:
    """Compares a manifest with a store, and does what is missing.

    Each model is loaded once, without its weights while these are not needed.

    Args:
        manifest: What the store should hold.
        store: The store.
        load: `CachedGenerator.load`, sharing the store.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: PrefixStore,
        load: Callable[..., CachedGenerator],
    ) -> None:
        self._manifest = manifest
        self._store = store
        self._load = load
        self._generators: dict[tuple[str | None, str | None], CachedGenerator] = {}

    def plan(self) -> list[SyncStep]:
        """Return what is to be done, in the manifest's order; nothing is changed.

        Raises:
            ModelError: A prompt's model cannot be loaded.
            UsageError: Its template refuses a prompt, or a name is used already.
            StoreError: The store cannot be read.
        """
        specs = self._manifest.prompts
        statuses = [self._look_up(spec) for spec in specs]
        key_by_name = {
            spec.name: status.key
            for spec, status in zip(specs, statuses, strict=True)
            if spec.pin
        }
        steps = [
            self._step(spec, status, key_by_name)
            for spec, status in zip(specs, statuses, strict=True)
        ]
        unpins = list(self._unpins(key_by_name, steps))
        unpinned = {step.name for step in unpins}
        return [
            *(s for s in steps if s.is_stale or s.name not in unpinned),
            *unpins,
        ]

    def _look_up(self, spec: PromptSpec) -> _Status:
        with _error_context(self._manifest, spec):
            generator, prompt = self._rendered(spec)
            key, is_stored = generator.is_built(prompt, **spec.settings)
            if spec.pin:
                self._check_name(spec.name, key)
            if is_stored:
                return _Status(key, None)
            divergence = generator.explain(prompt, **spec.settings).divergence
            return _Status(key, divergence.culprit if divergence else "not stored yet")

    def _step(
        self, spec: PromptSpec, status: _Status, key_by_name: Mapping[str, str]
    ) -> SyncStep:
        is_listed = self._store.listed_at(status.key) is not None
        key = status.key if is_listed else None
        if status.build_reason is not None:
            return SyncStep(spec.name, "build", key, status.build_reason)
        if spec.pin:
            action, reason = self._pinning(spec.name, status.key, key_by_name)
            return SyncStep(spec.name, action, key, reason)
        if not is_listed:
            return SyncStep(spec.name, "build", key, "stored as a part of another")
        return SyncStep(spec.name, "keep", key, "up to date")

    def _pinning(
        self, name: str, key: str, key_by_name: Mapping[str, str]
    ) -> tuple[Action, str]:
        pin = next((pin for pin in self._pins() if pin.key == key), None)
        if pin is None:
            return "pin", "stored, but not pinned"
        if pin.name == name:
            return "keep", "up to date"
        if self._is_own(pin) and key_by_name.get(str(pin.name)) != key:
            return "pin", f"was named {pin.name}"
        # A prefix has one name, and any name keeps it.
        return "keep", f"pinned as {pin.name}"

    def _pins(self) -> list[PrefixRow]:
        """Return the pins of the default namespace, which manifests are about."""
        return self._store.pins(namespace="")

    def _is_own(self, pin: PrefixRow) -> bool:
        return pin.manifest == str(self._manifest.path)

    def _check_name(self, name: str, key: str) -> None:
        """Raise UsageError if a different manifest gave the name to something else."""
        for pin in self._pins():
            is_others = pin.manifest not in (None, str(self._manifest.path))
            if pin.name == name and pin.key != key and is_others:
                raise UsageError(f"the name is taken by {pin.manifest}")

    def _unpins(
        self, key_by_name: Mapping[str, str], steps: Sequence[SyncStep]
    ) -> Iterator[SyncStep]:
        """Yield a step for each pin that only an earlier state of the manifest had.

        A name that is now of a different prompt moves there by itself.
        """
        names = {spec.name for spec in self._manifest.prompts}
        renamed = {step.key for step in steps if step.action == "pin"}
        for pin in self._pins():
            name = str(pin.name)
            if self._is_own(pin) and name not in key_by_name and pin.key not in renamed:
                reason = "the manifest no longer names it"
                if name in names:
                    reason = "the manifest says pin = false"
                yield SyncStep(name, "unpin", pin.key, reason)

    def _rendered(self, spec: PromptSpec) -> tuple[CachedGenerator, RenderedPrompt]:
        model = (spec.model, spec.adapter_path)
        if model not in self._generators:
            self._generators[model] = self._load(
                spec.model, adapter_path=spec.adapter_path
            )
        generator = self._generators[model]
        return generator, generator.render_prefix(spec)

    def execute(self, steps: Sequence[SyncStep], build: Build) -> list[SyncStep]:
        """Execute the steps; return them with the keys of their prefixes.

        Args:
            steps: What `plan` returned.
            build: Builds a prompt and shows how far it is.

        Raises:
            PromptCacheError: A prompt cannot be built.
        """
        specs = {spec.name: spec for spec in self._manifest.prompts}
        return [
            self._build(step, specs[step.name], build)
            if step.action in ("build", "pin")
            else self._unpin(step)
            for step in steps
        ]

    def _build(self, step: SyncStep, spec: PromptSpec, build: Build) -> SyncStep:
        with _error_context(self._manifest, spec):
            # If everything is stored, this only lists the prefix.
            key = build(*self._rendered(spec), spec).key
        if spec.pin:
            self._store.pin(key, spec.name, manifest=str(self._manifest.path))
        return replace(step, key=key)

    def _unpin(self, step: SyncStep) -> SyncStep:
        if step.action == "unpin":
            self._store.unpin(step.name, namespace="")
        return step


@contextlib.contextmanager
def _error_context(manifest: Manifest, spec: PromptSpec) -> Iterator[None]:
    """Put the manifest and the prompt in front of an error's message."""
    try:
        yield
    except PromptCacheError as error:
        place = f"{manifest.path.name}: prompts.{spec.name}"
        raise type(error)(f"{place}: {error}") from error
