"""Loaded models: what decides where a model can be resumed, and by which name."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from promptcache.errors import UsageError
from promptcache.kvcache.classes import check_supported, is_all_plain, needs_checkpoints
from promptcache.models import load
from promptcache.models.draft import DraftPair
from promptcache.models.identity.identity import (
    IdentifiedModel,
    ModelIdentity,
    hash_layout,
)
from promptcache.models.length_dependence import length_dependence
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.models.settings import DEFAULT_SETTINGS, Settings
from promptcache.segments.fingerprint import Fingerprint, hash_json, make_fingerprint


class LoadedModel:
    """A model in memory, with its identity.

    Attributes:
        model: The mlx-lm model.
        length_dependence: How its KV values depend on the length of what is read.
    """

    def __init__(
        self,
        model: Any,
        *,
        identity: ModelIdentity | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """Take a model.

        Args:
            model: A model of mlx-lm.
            identity: What it is, if known; else it is hashed on first use.
            announce: Called with a line for people when hashing takes long.
        """
        self.model = model
        self.length_dependence = length_dependence(model)
        self._announce = announce
        self._main = IdentifiedModel(model, identity, announce)
        # Of what the length dependence is known.
        self._last = identity
        self._drafts: dict[int, IdentifiedModel] = {}
        # By settings, what was fingerprinted under them, and the fingerprint.
        self._fingerprints: dict[str, tuple[list[ModelIdentity], Fingerprint]] = {}

    @property
    def identity(self) -> ModelIdentity:
        """Return what the model is now. Raises ModelError if that cannot be told."""
        return self._main.identity

    def refresh_identity(self) -> None:
        """Have it and its drafts identified again, as arrays were changed in place."""
        for identified in (self._main, *self._drafts.values()):
            identified.refresh()

    @cached_property
    def vocab_size(self) -> int:
        """Return how many tokens the model has embeddings for."""
        return vocab_size_of(self.model)

    def check_token_ids(
        self, token_ids: Sequence[int], *, draft_model: Any = None
    ) -> None:
        """Raise UsageError for a token that the model has no embedding for.

        MLX would read whatever is in memory there, or crash.
        """
        size = self.vocab_size
        if draft_model is not None:
            size = min(size, vocab_size_of(draft_model))
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= size):
            wrong = next(i for i in token_ids if not 0 <= i < size)
            raise UsageError(
                f"token id {wrong} is not in the vocabulary of the model, [0, {size})"
            )

    def reader(self, settings: Settings) -> Any:
        """Return what reads a prompt: the model, or both of a pair."""
        draft = settings.draft_model
        return self.model if draft is None else DraftPair(self.model, draft)

    def make_cache(self, settings: Settings) -> list[Any]:
        """Return a fresh cache for what reads a prompt."""
        cache: list[Any] = make_prompt_cache(
            self.reader(settings), settings.max_kv_size
        )
        return cache

    def needs_checkpoints(self, settings: Settings = DEFAULT_SETTINGS) -> bool:
        """Return whether it can be resumed only where a checkpoint was taken."""
        return needs_checkpoints(self.make_cache(settings))

    def is_sliceable(self, settings: Settings = DEFAULT_SETTINGS) -> bool:
        """Return whether its cache is nothing but rows, of which any are a prefix."""
        return is_all_plain(self.make_cache(settings))

    def check_supported(self, settings: Settings) -> None:
        """Raise UnsupportedCacheError if a part of the cache cannot be stored."""
        check_supported(self.make_cache(settings), self.reader(settings))

    def exact_after(self, settings: Settings) -> int | None:
        """Return from which token on to resume only where plain pieces end, if any."""
        if settings.exact is not None:
            return 0 if settings.exact else None
        starts = []
        if self.length_dependence is not None:
            # A piece that reaches beyond is read in another way as a whole.
            start = self.length_dependence.start
            starts.append(start - start % settings.step_size)
        if settings.max_kv_size is not None and not hasattr(self.model, "make_cache"):
            # A full cache drops a row before the next piece, wherever that begins.
            starts.append(settings.max_kv_size - 1)
        return min(starts, default=None)

    def plan(
        self,
        settings: Settings,
        boundaries: tuple[int, ...] = (),
        answer: int | None = None,
    ) -> PrefillPlan:
        """Return where the pieces of a prompt with these boundaries end."""
        self._keep_up()
        exact_after = self.exact_after(settings)
        needs_checkpoint = self.needs_checkpoints(settings)
        return PrefillPlan(
            settings.step_size, boundaries, exact_after, answer, needs_checkpoint
        )

    def _keep_up(self) -> None:
        """Look again at a model that has changed."""
        if not self._main.is_current():
            self.length_dependence = length_dependence(self.model)

    def fingerprint(self, settings: Settings = DEFAULT_SETTINGS) -> Fingerprint:
        """Return what KV values depend on now, besides the token ids.

        Raises ModelError if that cannot be told.
        """
        draft = settings.draft_model
        models = [self._main] if draft is None else [self._main, self._draft(draft)]
        identities = [model.identity for model in models]
        if identities[0] is not self._last:
            self._last = identities[0]
            self.length_dependence = length_dependence(self.model)
        key = hash_json(self._setting_parts(settings)) + str(id(draft))
        cached = self._fingerprints.get(key)
        if cached is None or cached[0] != identities:
            cached = identities, self._make_fingerprint(settings, *identities)
            self._fingerprints[key] = cached
        return cached[1]

    def _make_fingerprint(
        self,
        settings: Settings,
        identity: ModelIdentity,
        draft: ModelIdentity | None = None,
    ) -> Fingerprint:
        exact = None
        if settings.store_bits is not None:
            exact = self.fingerprint(replace(settings, store_bits=None))
        parts = {
            **self._setting_parts(settings),
            **identity.parts,
            "draft": "" if draft is None else hash_json(dict(draft.parts)),
            "layout": hash_layout(self.make_cache(settings)),
        }
        return make_fingerprint(
            parts, model=identity.name, source=identity.source, exact=exact
        )

    def _setting_parts(self, settings: Settings) -> dict[str, str]:
        kv, exact_after = settings.kv, self.exact_after(settings)
        exact = "" if exact_after is None else f"{exact_after}+{settings.step_size}"
        # Named only where it is given, as it is younger than the other parts.
        at_rest = {"store_bits": str(settings.store_bits)}
        return {
            **(at_rest if settings.store_bits is not None else {}),
            # Group size and start mean nothing without bits.
            "kv_bits": str(kv.bits or ""),
            "kv_group_size": str(kv.group_size if kv.bits else ""),
            "quantized_kv_start": str(kv.start if kv.bits else ""),
            "max_kv_size": str(settings.max_kv_size or ""),
            "exact": exact,
            "namespace": settings.namespace,
        }

    def load_draft(self, path_or_hf_repo: str | Path, vocab_size: int) -> Any:
        """Load a draft model with a vocabulary of a given size. Raises ModelError."""
        draft, identity = load.load_draft(path_or_hf_repo, vocab_size)
        self.register_draft(draft, identity)
        return draft

    def register_draft(self, draft: Any, identity: ModelIdentity) -> None:
        """Note what a draft model is, so that it need not be hashed."""
        self._drafts[id(draft)] = IdentifiedModel(draft, identity, self._announce)

    def _draft(self, draft: Any) -> IdentifiedModel:
        """Return what a draft model is; it is kept, so that no other gets its id."""
        if id(draft) not in self._drafts:
            self._drafts[id(draft)] = IdentifiedModel(draft, announce=self._announce)
        return self._drafts[id(draft)]


def vocab_size_of(model: Any) -> int:
    """Return the rows of a model's embedding of tokens; others, of places, have fewer.

    MLX takes ids up to 2**31 where there is none to be seen.
    """
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    tables = (module for module in model.modules() if isinstance(module, kinds))
    return max((table.weight.shape[0] for table in tables), default=2**31)
