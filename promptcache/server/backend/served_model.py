"""Served models: a model in memory, with what a request has to know of it."""

from dataclasses import dataclass, field
from typing import Any

from promptcache.models.identity.identity import ModelIdentity
from promptcache.models.loaded import LoadedModel
from promptcache.models.settings import Settings


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be used on any thread, also while another takes its place.

    Attributes:
        model: The mlx-lm model.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        identity: What it is.
        draft_identity: What its draft model is, if it has one.
        settings: How it reads prompts.
        vocab_size: How many tokens it knows.
        most_tokens: How long a prompt may be, None for any length.
    """

    model: Any
    tokenizer: Any
    identity: ModelIdentity
    draft_identity: ModelIdentity | None
    settings: Settings
    vocab_size: int
    most_tokens: int | None
    _loaded: dict[str, LoadedModel] = field(default_factory=dict)

    def in_namespace(self, namespace: str) -> LoadedModel:
        """Return the model as it is known in a namespace."""
        if namespace not in self._loaded:
            loaded = LoadedModel(
                self.model, identity=self.identity, namespace=namespace
            )
            if self.draft_identity is not None:
                loaded.register_draft(self.settings.draft_model, self.draft_identity)
            self._loaded[namespace] = loaded
        return self._loaded[namespace]
