"""CachedGenerator: match, load, stream the rest, save."""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from promptcache.engine.build import Build
from promptcache.engine.decode import LogitsProcessor, penalties_of, sampler_of
from promptcache.engine.generation import Generation
from promptcache.engine.request import DEFAULT_DRAFT_TOKENS, Progress, Request
from promptcache.engine.response import GenerationResponse
from promptcache.errors import KeyNotFoundError, StoreError, UsageError, warn
from promptcache.explain import explain
from promptcache.explain.lint import VolatileText, find_volatile_text
from promptcache.explain.types import Explanation
from promptcache.models import load
from promptcache.models.identity.identity import ModelIdentity
from promptcache.models.loaded import LoadedModel
from promptcache.models.prefill_plan import DEFAULT_STEP_SIZE
from promptcache.models.settings import DEFAULT_SETTINGS, Settings
from promptcache.prompts import render
from promptcache.prompts.chat import Message, is_messages
from promptcache.prompts.parts import PromptParts, compose
from promptcache.prompts.render import Prompt, RenderedPrompt
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match
from promptcache.store import PrefixStore
from promptcache.store.names import check_name
from promptcache.store.reports import Prefix
from promptcache.tiers import memory_limits
from promptcache.tiers.background_writer import BackgroundWriter
from promptcache.tiers.memory_tier import MemoryTier
from promptcache.tiers.prompt_read import PromptRead, SavePolicy


@dataclass(frozen=True, slots=True)
class BuiltPrefix(Prefix):
    """A prefix that `build` made sure of.

    Attributes:
        cached_tokens: Tokens that were in the store before.
        seconds: Time it took, without loading the model.
    """

    cached_tokens: int = 0
    seconds: float = 0.0


class CachedGenerator:
    """Generates like mlx-lm, resuming every prompt from its longest cached prefix.

    Trouble with the store never breaks a generation: it becomes one
    `PromptCacheWarning` and a prefill. `build` raises instead.

    Attributes:
        model: The mlx-lm model.
        tokenizer: Its tokenizer.
        store: The store, or None if it cannot be used.
        save: Whether to save the prompts that are read, unless a call says otherwise.
        namespace: What it finds, builds, names and explains is in this namespace.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        store: PrefixStore | str | Path | None = None,
        max_nbytes: int | None = None,
        memory_limit: int | None = None,
        save: SavePolicy = "auto",
        reuse: bool = True,
        namespace: str = "",
        chat_template_config: Mapping[str, Any] | None = None,
        identity: ModelIdentity | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """Wrap a model that is loaded already.

        Args:
            model: A model of mlx-lm.
            tokenizer: Its tokenizer.
            store: A store to share, or the folder of one to open; the default
                folder if None.
            max_nbytes: Size limit of a store opened here; see `PrefixStore`.
            memory_limit: How many bytes of recent prompts' caches to keep in memory,
                else `PROMPTCACHE_MEMORY_LIMIT`, else an eighth of the memory; 0 for
                none.
            save: Whether to save the prompts that are read: True for all, "auto" for
                those with at least 512 new tokens.
            reuse: Whether to look for cached prefixes.
            namespace: Prefixes are found only under the namespace they were saved in.
            chat_template_config: Further arguments of the chat template, for all
                prompts that are given none of their own.
            identity: What the model is, if known; else it is hashed on first use.
            announce: Called with a line for people when hashing a model takes long,
                else that is a warning.
        """
        self.model = model
        if not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        self.tokenizer = tokenizer
        self.store: PrefixStore | None = None
        self.save: SavePolicy = save
        self.namespace = namespace
        self._reuse = reuse
        self._chat_template_config = chat_template_config
        self._loaded = LoadedModel(
            model, identity=identity, namespace=namespace, announce=announce
        )
        self._writer = BackgroundWriter()
        self._hot = MemoryTier(memory_limits.cache_limit(memory_limit))
        self._store_error: StoreError | None = None
        self._owns_store = not isinstance(store, PrefixStore)
        if isinstance(store, PrefixStore):
            self.store = store
        elif reuse or save:
            self._open_store(store, max_nbytes)

    def _open_store(self, path: str | Path | None, max_nbytes: int | None) -> None:
        try:
            self.store = PrefixStore(path, max_nbytes=max_nbytes)
        except StoreError as error:
            self._store_error = error
            warn(f"going on without the store: {error}")
            return
        if self.store.rebuilt:
            warn(
                f"the index of {self.store.path} was missing or damaged and has been "
                f"rebuilt from {self.store.rebuilt} blobs"
            )

    @classmethod
    def load(
        cls,
        path_or_hf_repo: str | Path | None = None,
        *,
        adapter_path: str | Path | None = None,
        store: PrefixStore | str | Path | None = None,
        max_nbytes: int | None = None,
        memory_limit: int | None = None,
        save: SavePolicy = "auto",
        reuse: bool = True,
        namespace: str = "",
        chat_template_config: Mapping[str, Any] | None = None,
        announce: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model like `mlx_lm.load` does, and wrap it.

        Args:
            path_or_hf_repo: A folder or a hub repository, else `PROMPTCACHE_MODEL`,
                else the embedded default, SmolLM2-135M-Instruct.
            adapter_path: The folder of a LoRA adapter.
            store: See `CachedGenerator`.
            max_nbytes: See `CachedGenerator`.
            memory_limit: See `CachedGenerator`.
            save: See `CachedGenerator`.
            reuse: See `CachedGenerator`.
            namespace: See `CachedGenerator`.
            chat_template_config: See `CachedGenerator`.
            announce: Called with a line for people before something takes long.
            kwargs: Further arguments of `mlx_lm.load`.

        Raises:
            ModelError: The model cannot be found or loaded.
        """
        model, tokenizer, identity = load.load(
            path_or_hf_repo, adapter_path=adapter_path, announce=announce, **kwargs
        )
        return cls(
            model,
            tokenizer,
            store=store,
            max_nbytes=max_nbytes,
            memory_limit=memory_limit,
            save=save,
            reuse=reuse,
            namespace=namespace,
            chat_template_config=chat_template_config,
            identity=identity,
            announce=announce,
        )

    def close(self) -> None:
        """Finish what is being saved, and close the store unless it was handed in."""
        self._writer.close()
        self._hot.clear()
        if self.store is not None and self._owns_store:
            self.store.close()
            self.store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        with contextlib.ExitStack() as stack:
            is_interrupted = kind in (KeyboardInterrupt, SystemExit)
            if self.store is not None and is_interrupted:
                stack.enter_context(self.store.patience.hurried())
            self.close()

    @property
    def identity(self) -> ModelIdentity:
        """Return what the model is now; it is hashed if that is not known.

        Raises ModelError if that fails.
        """
        return self._loaded.identity

    def refresh_identity(self) -> None:
        """Have the model, and its drafts, hashed again before they are used.

        Call it after an array of theirs was changed in place (`weight[0] = 1`). Arrays,
        modules and plain attributes that were replaced are noticed by themselves.
        """
        self._loaded.refresh_identity()

    def fingerprint(self, settings: Settings = DEFAULT_SETTINGS) -> Fingerprint:
        """Return what KV values depend on now, besides the token ids.

        Raises ModelError if that cannot be told.
        """
        return self._loaded.fingerprint(settings)

    def load_draft(self, path_or_hf_repo: str | Path) -> Any:
        """Load a draft model, to hand to `build` and `stream_generate`.

        Raises:
            ModelError: It cannot be found or loaded, or has another vocabulary.
        """
        return self._loaded.load_draft(path_or_hf_repo, self.tokenizer.vocab_size)

    def render(
        self,
        prompt: Prompt,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Return a prompt as token ids, with the places where it is worth resuming.

        Args:
            prompt: Text, token ids or chat messages.
            tools: Tools for the chat template.
            chat_template_config: Further arguments of the chat template, in place of
                the generator's.

        Raises:
            UsageError: The prompt is empty, or no prompt of this model.
        """
        rendered = render.render_prompt(
            self.tokenizer,
            prompt,
            **self._template_options(tools, chat_template_config),
        )
        self._loaded.check_token_ids(rendered.token_ids)
        return rendered

    def render_open(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Return what comes before the last user's text, or before its last part.

        Args:
            messages: Chat messages with a user's text to be replaced.
            tools: See `render`.
            chat_template_config: See `render`.

        Raises:
            UsageError: Nothing comes before it.
        """
        rendered = render.render_open(
            self.tokenizer,
            messages,
            **self._template_options(tools, chat_template_config),
        )
        self._loaded.check_token_ids(rendered.token_ids)
        return rendered

    def render_parts(self, parts: PromptParts) -> RenderedPrompt:
        """Return a whole prompt that is given in parts. Raises UsageError."""
        if parts.raw:
            return self.render(parts.text())
        messages = parts.compose(parts.prompt)
        return self.render(messages, parts.tools, parts.chat_template_config)

    def render_prefix(self, parts: PromptParts) -> RenderedPrompt:
        """Return what is to be built of a prompt that is given in parts.

        Without a user's text that is everything before it. Raises UsageError.
        """
        if not parts.is_open:
            return self.render_parts(parts)
        messages = parts.compose("")
        return self.render_open(messages, parts.tools, parts.chat_template_config)

    def _template_options(
        self,
        tools: Sequence[Message] | None,
        config: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        return {
            "tools": tools,
            "chat_template_config": (
                self._chat_template_config if config is None else config
            ),
            "every_message": self._loaded.needs_checkpoints(),
        }

    def match(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Match:
        """Return what a generation of this prompt would reuse.

        The last token is part of it only where the logits after it are stored: the
        model has to read something.

        Args:
            prompt: Text, token ids or chat messages.
            tools: Tools for the chat template.
            chat_template_config: See `render`.
            settings: `kv_bits`, `exact` and so on, as `stream_generate` takes them.

        Raises:
            UsageError: The prompt is empty, or no prompt of this model.
            StoreError: The store cannot be read.
        """
        token_ids = self.render(prompt, tools, chat_template_config).token_ids
        fingerprint = self.fingerprint(Settings.of(**settings))
        return self._usable_store().lookup(token_ids, fingerprint, generating=True)

    def explain(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Explanation:
        """Say what a generation of this prompt would reuse, and why not more.

        Args:
            prompt: Text, token ids or chat messages.
            tools: Tools for the chat template.
            chat_template_config: See `render`.
            settings: `kv_bits`, `exact` and so on, as `stream_generate` takes them.

        Raises:
            UsageError: The prompt is empty, or no prompt of this model.
            StoreError: The store cannot be read.
        """
        rendered = self.render(prompt, tools, chat_template_config)
        fingerprint = self.fingerprint(Settings.of(**settings))
        store = self._usable_store()
        around = store.nearby(rendered.token_ids, fingerprint, rendered.origin)
        estimate = store.estimate(fingerprint, around.match.cached_tokens)
        declines = estimate is not None and estimate.prefill_is_faster
        return explain.explain(
            self.tokenizer,
            rendered,
            fingerprint,
            around,
            declined=estimate if declines else None,
        )

    def _usable_store(self) -> PrefixStore:
        if self.store is None:
            raise self._store_error or StoreError("this generator has no store")
        return self.store

    # Building

    def build(
        self,
        prompt: Prompt | None = None,
        *,
        system: str | None = None,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
        name: str | None = None,
        exact: bool | None = None,
        max_kv_size: int | None = None,
        draft_model: Any = None,
        prefill_step_size: int = DEFAULT_STEP_SIZE,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        store_bits: int | None = None,
        prompt_progress_callback: Progress | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> BuiltPrefix:
        """Make sure that a prefix is stored, piece by piece, and pin it if named.

        What is stored already is not computed again, so that an interrupted build
        resumes. Of two processes that build the same prefix one waits.

        Args:
            prompt: Text, token ids or chat messages to store in full.
            system: A system prompt. Without a prompt, what comes before the user's
                message is stored.
            tools: Tools for the chat template.
            chat_template_config: See `render`.
            name: Pin the prefix under this name.
            exact: See `stream_generate`.
            max_kv_size: See `mlx_lm.generate.generate_step`.
            draft_model: See `mlx_lm.stream_generate`.
            prefill_step_size: Most tokens to process at once, and to lose when
                interrupted.
            kv_bits: See `mlx_lm.generate.generate_step`.
            kv_group_size: See `mlx_lm.generate.generate_step`.
            quantized_kv_start: See `mlx_lm.generate.generate_step`.
            store_bits: See `stream_generate`.
            prompt_progress_callback: Called with tokens processed and their total.
            on_wait: Called when another process builds the same prefix.

        Raises:
            UnsupportedCacheError: The model's cache cannot be stored.
            UsageError: There is nothing to build.
            StoreError: The store cannot be written.
        """
        if name is not None:
            check_name(name)
        settings = Settings.of(
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            max_kv_size=max_kv_size,
            exact=exact,
            prefill_step_size=prefill_step_size,
            draft_model=draft_model,
            store_bits=store_bits,
        )
        rendered = self._prompt_to_build(prompt, system, tools, chat_template_config)
        if draft_model is not None:
            self._loaded.check_token_ids(rendered.token_ids, draft_model=draft_model)
        store = self._usable_store()
        started = time.perf_counter()
        building = Build(self._loaded, store, self._writer, rendered, settings)
        cached_tokens = building.run(
            prompt_progress_callback or (lambda done, total: None), on_wait
        )
        try:
            if name is not None:
                store.pin(building.key, name, namespace=self.namespace)
            prefix = store.resolve(building.key, namespace=self.namespace)
        except KeyNotFoundError as error:
            raise StoreError(
                "what was built has been evicted by another process already"
            ) from error
        return BuiltPrefix(
            **asdict(prefix),
            cached_tokens=cached_tokens,
            seconds=time.perf_counter() - started,
        )

    def _prompt_to_build(
        self,
        prompt: Prompt | None,
        system: str | None,
        tools: Sequence[Message] | None,
        chat_template_config: Mapping[str, Any] | None,
    ) -> RenderedPrompt:
        if prompt is None:
            if system is None and not tools:
                raise UsageError("there is nothing to build, give a prompt or a system")
            messages = compose(system=system, user="")
            return self.render_open(messages, tools, chat_template_config)
        if isinstance(prompt, str) and (system is not None or tools):
            prompt = compose(system=system, user=prompt)
        elif is_messages(prompt):
            prompt = compose(system=system, messages=prompt)
        return self.render(prompt, tools, chat_template_config)

    def is_built(self, prompt: RenderedPrompt, **settings: Any) -> tuple[str, bool]:
        """Return the key that `build` would give, and whether all of it is stored.

        Args:
            prompt: What `render` and the like returned.
            settings: As `build` takes them.

        Raises:
            UnsupportedCacheError: The model's cache cannot be stored.
            UsageError: There is nothing to build.
            StoreError: The store cannot be read.
        """
        store = self._usable_store()
        wanted = Settings.of(**settings)
        building = Build(self._loaded, store, self._writer, prompt, wanted)
        return building.key, building.is_stored()

    def lint(self, prompt: RenderedPrompt) -> list[VolatileText]:
        """Return what is likely to change early in a prompt, and spoil its reuse."""
        return find_volatile_text(self.tokenizer, prompt)

    # Generating

    def generate(self, prompt: Prompt, **kwargs: Any) -> str:
        """Return the whole answer; see `stream_generate`."""
        return "".join(r.text for r in self.stream_generate(prompt, **kwargs))

    def stream_generate(
        self,
        prompt: Prompt,
        max_tokens: int = 256,
        *,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
        save: SavePolicy | None = None,
        reuse: bool | None = None,
        exact: bool | None = None,
        temp: float | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        repetition_context_size: int = 20,
        seed: int | None = None,
        sampler: Callable[[mx.array], mx.array] | None = None,
        logits_processors: list[LogitsProcessor] | None = None,
        prefill_step_size: int = DEFAULT_STEP_SIZE,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        store_bits: int | None = None,
        max_kv_size: int | None = None,
        draft_model: Any = None,
        num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        input_embeddings: mx.array | None = None,
        save_answer: bool = False,
        on_saved: Callable[[str], None] = lambda key: None,
        prompt_progress_callback: Progress | None = None,
    ) -> Generator[GenerationResponse, None, None]:
        """Generate token by token, like `mlx_lm.stream_generate`.

        Closing the generator early saves the prompt all the same, if the policy says
        so and it was read in full.

        Args:
            prompt: Text, token ids or chat messages.
            max_tokens: Most tokens to generate, -1 for no limit.
            tools: Tools for the chat template.
            chat_template_config: See `render`.
            save: Overrides the generator's policy.
            reuse: Overrides whether to look for cached prefixes.
            exact: Reuse only where plain mlx-lm's own prefill pieces end, so that a
                run repeats its arithmetic, piece for piece. None: only where the
                model's values depend on the length of what is read.
            temp: Sampling temperature, 0 for greedy; see `make_sampler`.
            top_p: See `mlx_lm.sample_utils.make_sampler`.
            min_p: See `mlx_lm.sample_utils.make_sampler`.
            top_k: See `mlx_lm.sample_utils.make_sampler`.
            repetition_penalty: Penalty for repeated tokens of the whole prompt and
                the answer; see `mlx_lm.sample_utils.make_logits_processors`.
            repetition_context_size: How many tokens back it looks.
            seed: Seed for the sampling.
            sampler: A sampler in place of the one that `temp` and so on make.
            logits_processors: Called with the token ids of the whole prompt and the
                answer, shape `(tokens,)`, and the logits, shape `(1, vocabulary)`.
            prefill_step_size: Most prompt tokens to process at once.
            kv_bits: See `mlx_lm.generate.generate_step`.
            kv_group_size: See `mlx_lm.generate.generate_step`.
            quantized_kv_start: See `mlx_lm.generate.generate_step`.
            store_bits: Store keys and values in 8 or 4 bits, and reuse what is stored
                so. It takes half or a quarter of 16 bits, and restores nearly the same
                values. What is stored exactly is taken where it reaches as far.
            save_answer: Save the answer, too, where the prompt is saved: as far as it
                came, and unless it depends on how it was computed (a draft model,
                exact mode, quantization that began with it).
            on_saved: Called with the key of what was saved at the end, also an early
                one.
            prompt_progress_callback: Called with the prompt tokens done so far,
                cached ones included, and their total.
            max_kv_size: See `mlx_lm.generate.generate_step`.
            draft_model: See `mlx_lm.stream_generate`. Both models' caches are reused.
            num_draft_tokens: See `mlx_lm.generate.speculative_generate_step`.
            input_embeddings: See `mlx_lm.generate.generate_step`; nothing is cached.

        Raises:
            UsageError: The arguments make no sense, or mlx-lm cannot do it with this
                model.
        """
        if max_tokens == 0 or max_tokens < -1:
            raise UsageError("max_tokens must be at least 1, or -1 for no limit")
        if seed is not None and not 0 <= seed < 2**64:
            raise UsageError(f"seed must be in [0, 2**64), not {seed}")
        if draft_model is not None and input_embeddings is not None:
            raise UsageError("mlx-lm takes no input_embeddings with a draft model")
        if seed is not None:
            mx.random.seed(seed)
        rendered = self.render(prompt, tools, chat_template_config)
        if draft_model is not None:
            self._loaded.check_token_ids(rendered.token_ids, draft_model=draft_model)
        settings = Settings.of(
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            max_kv_size=max_kv_size,
            exact=exact,
            prefill_step_size=prefill_step_size,
            draft_model=draft_model,
            store_bits=store_bits,
        )
        read = PromptRead(
            rendered.token_ids,
            self._loaded.plan(settings, rendered.boundaries, rendered.answer),
            settings,
            origin=rendered.origin,
            reuse=self._reuse if reuse is None else reuse,
            save=self.save if save is None else save,
            can_be_stored=input_embeddings is None,
        )
        request = Request(
            read,
            max_tokens=max_tokens,
            sampler=sampler or sampler_of(temp, top_p, min_p, top_k),
            logits_processors=[
                *penalties_of(repetition_penalty, repetition_context_size),
                *(logits_processors or []),
            ],
            on_progress=prompt_progress_callback or (lambda done, total: None),
            num_draft_tokens=num_draft_tokens,
            on_match=lambda match: self._tell_other_config(rendered, settings, match),
            save_answer=save_answer,
            on_saved=on_saved,
            input_embeddings=input_embeddings,
        )
        return Generation(
            self.model,
            self.tokenizer,
            self.store,
            self._writer,
            self._hot,
            lambda: self.fingerprint(settings),
            request,
        ).stream()

    def _tell_other_config(
        self, rendered: RenderedPrompt, settings: Settings, match: Match
    ) -> None:
        """Warn if more would be reused with other arguments of the chat template."""
        store, chat = self.store, rendered.chat
        is_expected = match.cached_tokens >= max(rendered.boundaries, default=0)
        if store is None or chat is None or rendered.origin is None or is_expected:
            return
        fingerprint = self.fingerprint(settings)
        configs = store.configs(rendered.origin.template, namespace=self.namespace)
        for config in configs:
            if config == rendered.origin.config:
                continue
            with contextlib.suppress(UsageError):
                other = self.render(chat.messages, chat.tools, config)
                found = store.lookup(other.token_ids, fingerprint, generating=True)
                least = max(match.cached_tokens + 1, _least_meant(other))
                if found.cached_tokens >= least:
                    warn(
                        f"{found.cached_tokens} tokens of this prompt are cached with "
                        f"chat_template_config {json.dumps(config)}, and "
                        f"{match.cached_tokens} with "
                        f"{json.dumps(rendered.origin.config)}"
                    )
                    return


def _least_meant(rendered: RenderedPrompt) -> int:
    """Return how much prompts share at least that are meant to begin alike.

    That is the system prompt and tools, or without these all but the last text.
    """
    origin = rendered.origin
    if origin is not None and (origin.system or origin.tools):
        return rendered.head
    return max(rendered.boundaries, default=rendered.head)
