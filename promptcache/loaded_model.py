"""Loaded models: what decides where a model can be resumed, and by which name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from promptcache import loading
from promptcache.fingerprint import hash_json, make_fingerprint
from promptcache.length_dependence import length_dependence
from promptcache.prefill import Cuts
from promptcache.settings import DEFAULT_SETTINGS, Settings
from promptcache.speculation import DraftedModel
from promptcache.treatment import check_supported, needs_checkpoints, parts_of
from promptcache.types import Fingerprint


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
        identity: loading.ModelIdentity | None = None,
        namespace: str = "",
    ) -> None:
        """Take a model, and what it is, if known; else it is hashed on first use."""
        self.model = model
        self.length_dependence = length_dependence(model)
        self._identity = identity
        self._namespace = namespace
        self._fingerprints: dict[str, Fingerprint] = {}
        self._drafts: dict[int, tuple[Any, loading.ModelIdentity]] = {}

    @property
    def identity(self) -> loading.ModelIdentity:
        """Return what the model is."""
        if self._identity is None:
            self._identity = loading.identify(self.model)
        return self._identity

    def reader(self, settings: Settings) -> Any:
        """Return what reads a prompt: the model, or both of a pair."""
        draft = settings.draft_model
        return self.model if draft is None else DraftedModel(self.model, draft)

    def make_cache(self, settings: Settings) -> list[Any]:
        """Return a fresh cache for what reads a prompt."""
        cache: list[Any] = make_prompt_cache(
            self.reader(settings), settings.max_kv_size
        )
        return cache

    def needs_checkpoints(self, settings: Settings = DEFAULT_SETTINGS) -> bool:
        """Return whether it can be resumed only where a checkpoint was taken."""
        return needs_checkpoints(self.make_cache(settings))

    def is_divisible(self, settings: Settings = DEFAULT_SETTINGS) -> bool:
        """Return whether its cache is nothing but rows, of which any are a prefix."""
        parts = parts_of(self.make_cache(settings))
        return all(type(part).__name__ == "KVCache" for _, part in parts)

    def check_supported(self, settings: Settings) -> None:
        """Raise UnsupportedCacheError if a part of the cache cannot be stored."""
        check_supported(self.make_cache(settings), self.reader(settings))

    def exact_from(self, settings: Settings) -> int | None:
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

    def cuts(
        self,
        settings: Settings,
        boundaries: tuple[int, ...] = (),
        answer: int | None = None,
    ) -> Cuts:
        """Return where the pieces of a prompt with these boundaries end."""
        exact_from = self.exact_from(settings)
        return Cuts(settings.step_size, boundaries, exact_from, answer)

    def fingerprint(self, settings: Settings = DEFAULT_SETTINGS) -> Fingerprint:
        """Return what KV values depend on, besides the token ids."""
        parts = self._setting_parts(settings)
        known = hash_json(parts)
        if known not in self._fingerprints:
            parts |= {
                **self.identity.parts,
                "layout": loading.hash_layout(self.make_cache(settings)),
                "namespace": self._namespace,
            }
            exact = None
            if settings.store_bits is not None:
                exact = self.fingerprint(replace(settings, store_bits=None))
            self._fingerprints[known] = make_fingerprint(
                parts,
                model=self.identity.name,
                source=self.identity.source,
                exact=exact,
            )
        return self._fingerprints[known]

    def _setting_parts(self, settings: Settings) -> dict[str, str]:
        kv, exact_from = settings.kv, self.exact_from(settings)
        exact = "" if exact_from is None else f"{exact_from}+{settings.step_size}"
        draft = settings.draft_model
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
            "draft": "" if draft is None else hash_json(self._draft(draft).parts),
        }

    def load_draft(self, path_or_hf_repo: str | Path, vocab_size: int) -> Any:
        """Load a draft model with a vocabulary of a given size. Raises ModelError."""
        draft, identity = loading.load_draft(path_or_hf_repo, vocab_size)
        self.know_draft(draft, identity)
        return draft

    def know_draft(self, draft: Any, identity: loading.ModelIdentity) -> None:
        """Note what a draft model is, so that it need not be hashed."""
        self._drafts[id(draft)] = (draft, identity)

    def _draft(self, draft: Any) -> loading.ModelIdentity:
        """Return what a draft model is; it is kept, so that no other gets its id."""
        if id(draft) not in self._drafts:
            self._drafts[id(draft)] = (draft, loading.identify(draft))
        return self._drafts[id(draft)][1]
