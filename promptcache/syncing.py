"""Syncing: make the store hold what a manifest names, planned first."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from promptcache.errors import PromptCacheError
from promptcache.generator import BuiltPrefix, CachedGenerator
from promptcache.manifest import Manifest, PromptSpec
from promptcache.rendering import PromptParts, RenderedPrompt
from promptcache.store import PrefixStore

Action = Literal["keep", "build", "pin", "unpin"]
Load = Callable[[str | None, str | None], CachedGenerator]
Build = Callable[[CachedGenerator, RenderedPrompt, PromptSpec], BuiltPrefix]


@dataclass(frozen=True, slots=True)
class SyncStep:
    """What is to be done for one prompt.

    Attributes:
        name: The prompt's name.
        action: Nothing, read and save it, name it, or take its name away.
        key: The prefix it is about.
        reason: Why.
    """

    name: str
    action: Action
    key: str
    reason: str

    @property
    def is_stale(self) -> bool:
        """Return whether there is something to do."""
        return self.action != "keep"


class Syncing:
    """Compares a manifest with a store, and does what is missing.

    Models are loaded once each, and without their weights as long as these are not
    needed.
    """

    def __init__(self, manifest: Manifest, store: PrefixStore, load: Load) -> None:
        """Take a function that loads a model with an adapter, sharing the store."""
        self._manifest = manifest
        self._store = store
        self._load = load
        self._generators: dict[tuple[str | None, str | None], CachedGenerator] = {}

    def plan(self) -> list[SyncStep]:
        """Return what is to be done, in the manifest's order; nothing is changed.

        Raises:
            ModelError: A prompt's model cannot be loaded.
            UsageError: Its template refuses a prompt.
            StoreError: The store cannot be read.
        """
        steps = [self._step(spec) for spec in self._manifest.prompts]
        return [*steps, *self._unwanted()]

    def _step(self, spec: PromptSpec) -> SyncStep:
        with_name = {entry.name: entry for entry in self._store.pins()}
        pinned = with_name.get(spec.name)
        with _told_of(self._manifest, spec):
            generator, prompt = self._rendered(spec)
            key, is_stored = generator.is_built(prompt, **spec.settings)
            if not is_stored:
                explanation = generator.explain(prompt, **spec.settings)
                divergence = explanation.divergence
                reason = divergence.culprit if divergence else "not stored yet"
                return SyncStep(spec.name, "build", key, reason)
        own = str(self._manifest.path)
        is_pinned = pinned is not None and (pinned.key, pinned.manifest) == (key, own)
        if spec.pin and not is_pinned:
            return SyncStep(spec.name, "pin", key, "stored, but not under this name")
        if not spec.pin and is_pinned:
            return SyncStep(spec.name, "unpin", key, "the manifest says pin = false")
        return SyncStep(spec.name, "keep", key, "up to date")

    def _unwanted(self) -> Iterator[SyncStep]:
        """Yield the pins of this manifest that it names no longer."""
        wanted = {spec.name for spec in self._manifest.prompts}
        for entry in self._store.pins():
            is_own = entry.manifest == str(self._manifest.path)
            if is_own and entry.name is not None and entry.name not in wanted:
                reason = "the manifest names it no longer"
                yield SyncStep(entry.name, "unpin", entry.key, reason)

    def _rendered(self, spec: PromptSpec) -> tuple[CachedGenerator, RenderedPrompt]:
        wanted = (spec.model, spec.adapter_path)
        if wanted not in self._generators:
            self._generators[wanted] = self._load(*wanted)
        generator = self._generators[wanted]
        return generator, generator.render_prefix(_parts(spec))

    def execute(self, steps: Sequence[SyncStep], build: Build) -> list[SyncStep]:
        """Do what is planned; return it with the keys that came of it.

        Args:
            steps: What `plan` returned.
            build: Builds a prompt and shows how far it is.

        Raises:
            PromptCacheError: A prompt cannot be built.
        """
        specs = {spec.name: spec for spec in self._manifest.prompts}
        return [
            self._made(step, specs[step.name], build)
            if step.action in ("build", "pin")
            else self._unpinned(step)
            for step in steps
        ]

    def _made(self, step: SyncStep, spec: PromptSpec, build: Build) -> SyncStep:
        with _told_of(self._manifest, spec):
            # Of what is stored already, this lists the end only.
            key = build(*self._rendered(spec), spec).key
        if spec.pin:
            self._store.pin(key, spec.name, manifest=str(self._manifest.path))
        return replace(step, key=key)

    def _unpinned(self, step: SyncStep) -> SyncStep:
        if step.action == "unpin":
            self._store.unpin(step.name)
        return step


def _parts(spec: PromptSpec) -> PromptParts:
    return PromptParts(
        prompt=spec.prompt,
        system=spec.system,
        files=spec.files,
        messages=spec.messages,
        tools=spec.tools,
        chat_template_config=spec.chat_template_config,
        raw=spec.raw,
    )


@contextlib.contextmanager
def _told_of(manifest: Manifest, spec: PromptSpec) -> Iterator[None]:
    """Say of an error which prompt of which manifest it is about."""
    try:
        yield
    except PromptCacheError as error:
        place = f"{manifest.path.name}: prompts.{spec.name}"
        raise type(error)(f"{place}: {error}") from error
