"""The model provider: mlx-lm's, with models that promptcache can identify."""

import gc
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from promptcache.errors import PromptCacheError
from promptcache.models import load
from promptcache.models.loaded import LoadedModel
from promptcache.models.settings import Settings
from promptcache.server.backend.compat import ModelProvider, load_processor

# A model, its adapter and its draft, as mlx-lm tells them apart.
ModelKey = tuple[str, str | None, str | None]


class ServedModel(NamedTuple):
    """A model that can be used on any thread, also while another takes its place.

    Attributes:
        loaded: The mlx-lm model, with what identifies it.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        settings: How it reads prompts.
        vocab_size: How many tokens it knows.
        most_tokens: How long a prompt may be, None for any length.
    """

    loaded: LoadedModel
    tokenizer: Any
    settings: Settings
    vocab_size: int
    most_tokens: int | None


class UnavailableError(PromptCacheError):
    """Nothing can be generated, for a while or any more."""


class IdentifiedModelProvider(ModelProvider):
    """Loads models on demand, and knows what they are.

    Attributes:
        error: Why the default model cannot be loaded, if it cannot.
        ready: Set when it has been tried.
        name: What people call the default model.
        current: The model that is loaded, None while another one takes its place.
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
        self.name = load.display_name(str(cli_args.model))
        self.current: ServedModel | None = None
        self._store_bits = store_bits
        self._limit = most_tokens
        self._announce = announce

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

    def key_of(self, model: str, adapter: str | None, draft: str | None) -> ModelKey:
        """Return what mlx-lm makes of the names in a request."""
        return (
            self._model_map.get(model, model),
            self._adapter_map.get(model, adapter),
            self._draft_model_map.get(draft, draft),
        )

    def serves(self, model: str, adapter: Any, draft: Any) -> bool:
        """Return whether the names in a request mean what is loaded."""
        name = "default_model" if self.knows(model) else model
        return bool(self.key_of(name, adapter, draft) == self.model_key)

    def ensure_downloaded(self, key: ModelKey) -> None:
        """Have the files of a model and its draft on this machine.

        Raises ModelError where there is none, before the one that is loaded has to go.
        """
        model, adapter, draft = key
        load.ensure_downloaded(model, adapter_path=adapter, announce=self._announce)
        if draft is not None:
            load.ensure_downloaded(draft, announce=self._announce)

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        self.reset()
        gc.collect()
        mx.clear_cache()
        model, tokenizer, identity, config = load.load_with_config(
            model_path,
            adapter_path=adapter_path,
            announce=self._announce,
            tokenizer_config=self._tokenizer_config,
            trust_remote_code=self.cli_args.trust_remote_code,
        )
        if self.cli_args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        draft_model = draft_identity = None
        if draft_model_path is not None:
            draft_model, draft_identity = load.load_draft(
                draft_model_path, tokenizer.vocab_size
            )
        self.is_batchable = draft_model is None and all(
            hasattr(layer, "merge") for layer in make_prompt_cache(model)
        )
        self.model_key = (model_path, adapter_path, draft_model_path)
        self.model, self.tokenizer = model, tokenizer
        self.processor = load_processor(model, config)
        self.draft_model = draft_model
        limit = _context(config) if self._limit is None else self._limit
        loaded = LoadedModel(model, identity=identity)
        if draft_identity is not None:
            loaded.register_draft(draft_model, draft_identity)
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.current = ServedModel(
            loaded,
            tokenizer,
            self._settings(draft_model),
            min(vocab_size, loaded.vocab_size),
            limit or None,
        )

    def _settings(self, draft_model: Any) -> Settings:
        return Settings.of(
            kv_bits=self.cli_args.kv_bits,
            kv_group_size=self.cli_args.kv_group_size,
            quantized_kv_start=self.cli_args.quantized_kv_start,
            prefill_step_size=self.cli_args.prefill_step_size,
            draft_model=draft_model,
            store_bits=self._store_bits,
        )

    def reset(self) -> None:
        """Forget the current model."""
        super().reset()
        self.current = None

    @property
    def path(self) -> Path | None:
        """Return the default model's folder, if it is one."""
        path = Path(str(self.cli_args.model)).expanduser()
        return path.resolve() if path.is_dir() else None


def _context(config: Mapping[str, Any]) -> int | None:
    """Return for how many tokens a model was made, None if its config does not say."""
    text_config = config.get("text_config") or {}
    num_tokens = {**text_config, **config}.get("max_position_embeddings")
    return int(num_tokens) if isinstance(num_tokens, int) else None
