"""Models: which of them a request means, and the one that is loaded."""

import asyncio
import gc
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import mlx.core as mx

from promptcache.engine.batch.engine import Engine
from promptcache.errors import ModelError, PromptCacheError
from promptcache.generator import CachedGenerator
from promptcache.models import load
from promptcache.server.completion import Completion
from promptcache.server.constraints import Constraints
from promptcache.store import PrefixStore

# What agents call the model that they were made for; here it is the one that is served.
MEANS_DEFAULT = ("default_model", "claude*", "gpt-*", "o[1-9]*", "codex-*")


class UnavailableError(PromptCacheError):
    """Nothing can be generated, for a while or any more."""


class ModelKey(NamedTuple):
    """A model, its adapter and its draft, by name or folder."""

    model: str
    adapter: str | None = None
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is loaded, and what runs it.

    Attributes:
        key: Which it is.
        generator: The model with its caches.
        engine: What runs requests on it.
        constraints: Makes its answers match a schema.
        read_options: How it reads prompts; see `ReadOptions`.
        vocab_size: How many tokens it knows.
        most_tokens: How long a prompt may be, None for any length.
    """

    key: ModelKey
    generator: CachedGenerator
    engine: Engine
    constraints: Constraints
    read_options: dict[str, Any]
    vocab_size: int
    most_tokens: int | None

    def close(self) -> None:
        """End all requests, and finish what is being saved."""
        self.engine.close()
        self.generator.close()


class Models:
    """Has one model loaded at a time, and loads others that may be asked for.

    Attributes:
        name: What people call the default model.
        current: The model that is loaded, None while another one takes its place.
    """

    def __init__(
        self,
        options: Namespace,
        store: PrefixStore | None,
        *,
        memory_limit: int,
        allowed: Sequence[str] = (),
        store_bits: int | None = None,
        most_tokens: int | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """Load the default model.

        Args:
            options: The options of mlx-lm's server, whose model must be named.
            store: The store, or None to keep nothing on disk.
            memory_limit: How many bytes of memory caches may take.
            allowed: Patterns of other models, adapters and drafts that may be loaded.
            store_bits: In how many bits to store keys and values.
            most_tokens: How long a prompt may be, 0 for any length, None for as long
                as the model was made for.
            announce: Called with a line for people before something takes long.

        Raises:
            ModelError: It cannot be loaded.
        """
        self._options = options
        self._store = store
        self._memory_limit = memory_limit
        self._allowed = tuple(allowed)
        self._store_bits = store_bits
        self._most_tokens = most_tokens
        self._announce = announce
        self.name = load.display_name(str(options.model))
        self._default = ModelKey(str(options.model), None, options.draft_model)
        self.current: ServedModel | None = self._load(self._default)
        self._gate = asyncio.Lock()
        self._num_users = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    # Names

    def key_of(
        self, model: str, adapter: str | None = None, draft: str | None = None
    ) -> ModelKey:
        """Return which model these names mean.

        Raises ModelError for one that may not be loaded.
        """
        is_default = model in (self.name, self._default.model)
        if is_default or any(fnmatchcase(model, name) for name in MEANS_DEFAULT):
            model = self._default.model
        if draft is None or draft == "default_model":
            draft = self._default.draft
        known = {self._default.model, self._default.draft, None}
        for name in (model, adapter, draft):
            if name in known or any(fnmatchcase(name or "", p) for p in self._allowed):
                continue
            raise ModelError(
                f"there is no model {name} here; {self.name} is served, others need "
                "--allow-model"
            )
        return ModelKey(model, adapter, draft)

    def loaded(self, completion: Completion) -> ServedModel:
        """Return the model of a request, if it is the one that is loaded.

        Another one may be loaded for other clients, which stays their secret. Raises
        UnavailableError.
        """
        try:
            key = self.key_of(
                completion.model, completion.adapter, completion.draft_model
            )
        except ModelError:
            key = None
        if self.current is None or self.current.key != key:
            raise UnavailableError("this model is not loaded now, ask again later")
        return self.current

    # Loading

    @asynccontextmanager
    async def use(self, completion: Completion) -> AsyncIterator[ServedModel]:
        """Have a request's model loaded while the block runs.

        Raises ModelError if it cannot be; the one before then stays.
        """
        key = self.key_of(completion.model, completion.adapter, completion.draft_model)
        async with self._gate:
            if self.current is None or self.current.key != key:
                await asyncio.to_thread(self._ensure_downloaded, key)
                await self._is_idle.wait()
                await asyncio.to_thread(self._swap, key)
            served = self.current
            if served is None:
                raise UnavailableError("no model is loaded")
            self._num_users += 1
            self._is_idle.clear()
        try:
            yield served
        finally:
            self._num_users -= 1
            if not self._num_users:
                self._is_idle.set()

    def _ensure_downloaded(self, key: ModelKey) -> None:
        load.ensure_downloaded(
            key.model, adapter_path=key.adapter, announce=self._announce
        )
        if key.draft is not None:
            load.ensure_downloaded(key.draft, announce=self._announce)

    def _swap(self, key: ModelKey) -> None:
        self.close()
        gc.collect()
        mx.clear_cache()
        self.current = self._load(key)

    def _load(self, key: ModelKey) -> ServedModel:
        options = self._options
        tokenizer_config = {"trust_remote_code": bool(options.trust_remote_code)}
        if options.chat_template:
            tokenizer_config["chat_template"] = options.chat_template
        model, tokenizer, identity, config = load.load_with_config(
            key.model,
            adapter_path=key.adapter,
            announce=self._announce,
            tokenizer_config=tokenizer_config,
            trust_remote_code=options.trust_remote_code,
        )
        if options.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        generator = CachedGenerator(
            model,
            tokenizer,
            store=self._store,
            save=self._store is not None,
            memory_limit=self._memory_limit,
            chat_template_config=options.chat_template_args,
            identity=identity,
            announce=self._announce,
        )
        draft = None if key.draft is None else generator.load_draft(key.draft)
        engine = generator.engine(
            max_decoding=options.decode_concurrency,
            max_reading=options.prompt_concurrency,
        )
        engine.start()
        limit = _context(config) if self._most_tokens is None else self._most_tokens
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        return ServedModel(
            key,
            generator,
            engine,
            Constraints(tokenizer, generator.loaded.vocab_size),
            self._read_options(draft),
            min(vocab_size, generator.loaded.vocab_size),
            limit or None,
        )

    def _read_options(self, draft: Any) -> dict[str, Any]:
        options = self._options
        return {
            "kv_bits": options.kv_bits,
            "kv_group_size": options.kv_group_size,
            "quantized_kv_start": options.quantized_kv_start,
            "prefill_step_size": options.prefill_step_size,
            "draft_model": draft,
            "store_bits": self._store_bits,
        }

    def close(self) -> None:
        """Give up the model that is loaded."""
        served, self.current = self.current, None
        if served is not None:
            served.close()


def _context(config: dict[str, Any]) -> int | None:
    """Return for how many tokens a model was made, None if its config does not say."""
    text_config = config.get("text_config") or {}
    num_tokens = {**text_config, **config}.get("max_position_embeddings")
    return int(num_tokens) if isinstance(num_tokens, int) else None
