"""The model provider: mlx-lm's, with models that promptcache can identify."""

import gc
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from promptcache import loading
from promptcache.errors import ModelError, PromptCacheError
from promptcache.loaded_model import LoadedModel
from promptcache.server.mlx_lm_server import ModelProvider, load_processor
from promptcache.settings import Settings


class IdentifiedModelProvider(ModelProvider):
    """Loads models on demand, and knows what they are.

    Attributes:
        error: Why the default model cannot be loaded, if it cannot.
        ready: Set when it has been tried.
        name: What people call the default model.
        settings: How the current model reads prompts.
        most_tokens: How long a prompt may be, None for any length.
        vocab_size: How many tokens the current model knows.
    """

    def __init__(
        self,
        cli_args: Namespace,
        *,
        store_bits: int | None = None,
        most_tokens: int | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """Take the options of mlx-lm's server, whose model must be named.

        Args:
            cli_args: These options.
            store_bits: In how many bits to store keys and values.
            most_tokens: How long a prompt may be, 0 for any length, None for as long
                as the model was made for.
            announce: Called with a line for people before something takes long.
        """
        super().__init__(cli_args)
        self.error: PromptCacheError | None = None
        self.ready = threading.Event()
        self.name = loading.display_name(str(cli_args.model))
        self.settings = Settings()
        self.most_tokens: int | None = None
        self.vocab_size = 0
        self._store_bits = store_bits
        self._limit = most_tokens
        self._announce = announce
        self._identity: loading.ModelIdentity | None = None
        self._draft_identity: loading.ModelIdentity | None = None
        self._loaded: dict[str, LoadedModel] = {}

    def load_default(self) -> None:
        """Load the default model, and tell when that is done."""
        try:
            super().load_default()
        except PromptCacheError as error:
            self.error = error
            raise
        finally:
            self.ready.set()

    def load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> Any:
        """Load a model, unless it is the one that is loaded. Raises ModelError."""
        try:
            return super().load(model_path, adapter_path, draft_model_path)
        except BaseException:
            # The one before is gone already.
            self.reset()
            raise

    def knows(self, name: str) -> bool:
        """Return whether a name means the default model."""
        return name in ("default_model", self.name, self.cli_args.model)

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        self.reset()
        gc.collect()
        mx.clear_cache()
        model, tokenizer, self._identity, config = loading.load_with_config(
            model_path,
            adapter_path=adapter_path,
            announce=self._announce,
            tokenizer_config=self._tokenizer_config,
            trust_remote_code=self.cli_args.trust_remote_code,
        )
        if self.cli_args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        draft_model = None
        if draft_model_path is not None:
            draft_model = self._load_draft(draft_model_path, tokenizer.vocab_size)
        self.is_batchable = draft_model is None and all(
            hasattr(layer, "merge") for layer in make_prompt_cache(model)
        )
        self.model_key = (model_path, adapter_path, draft_model_path)
        self.model, self.tokenizer = model, tokenizer
        self.processor = load_processor(model, config)
        self.draft_model = draft_model
        self.settings = Settings.of(
            kv_bits=self.cli_args.kv_bits,
            kv_group_size=self.cli_args.kv_group_size,
            quantized_kv_start=self.cli_args.quantized_kv_start,
            prefill_step_size=self.cli_args.prefill_step_size,
            draft_model=draft_model,
            store_bits=self._store_bits,
        )
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        limit = _context(config) if self._limit is None else self._limit
        self.most_tokens = limit or None

    def _load_draft(self, path: str, vocab_size: int) -> Any:
        draft, tokenizer, self._draft_identity = loading.load(path)
        if tokenizer.vocab_size != vocab_size:
            raise ModelError(
                f"draft model {path} has another vocabulary than the model"
            )
        return draft

    def reset(self) -> None:
        """Forget the current model."""
        super().reset()
        self._loaded = {}
        self._identity = self._draft_identity = None

    def loaded_model(self, namespace: str) -> LoadedModel:
        """Return the current model as it is known in a namespace."""
        if namespace not in self._loaded:
            loaded = LoadedModel(
                self.model, identity=self._identity, namespace=namespace
            )
            if self.draft_model is not None and self._draft_identity is not None:
                loaded.know_draft(self.draft_model, self._draft_identity)
            self._loaded[namespace] = loaded
        return self._loaded[namespace]

    @property
    def path(self) -> Path | None:
        """Return the default model's folder, if it is one."""
        path = Path(str(self.cli_args.model)).expanduser()
        return path.resolve() if path.is_dir() else None


def _context(config: Mapping[str, Any]) -> int | None:
    """Return for how many tokens a model was made, None if its config does not say."""
    text_config = config.get("text_config") or {}
    found = {**text_config, **config}.get("max_position_embeddings")
    return int(found) if isinstance(found, int) else None
