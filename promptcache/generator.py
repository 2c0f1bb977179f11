"""CachedGenerator: match, load, stream the rest, save."""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from promptcache.engine.build import Build
from promptcache.engine.decode import LogitsProcessor, Sampler, penalties_of, sampler_of
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
from promptcache.models.settings import DEFAULT_SETTINGS, ReadOptions, Settings
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
from promptcache.tiers.prefix_cache import PrefixCache
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


class GeneratorOptions(TypedDict, total=False):
    """Keyword arguments of `CachedGenerator`, where they are documented."""

    store: PrefixStore | str | Path | None
    max_nbytes: int | None
    memory_limit: int | None
    save: SavePolicy
    reuse: bool
    namespace: str
    chat_template_config: Mapping[str, Any] | None
    announce: Callable[[str], None] | None


class LoadOptions(GeneratorOptions, total=False):
    """Those of `CachedGenerator.load`: the generator's, and `mlx_lm.load`'s."""

    tokenizer_config: dict[str, Any] | None
    model_config: dict[str, Any] | None
    lazy: bool
    revision: str | None
    trust_remote_code: bool


class SamplingOptions(TypedDict, total=False):
    """How to choose the tokens of an answer.

    Attributes:
        temp: Sampling temperature, 0 or None (default) for greedy; this and the next
            three as in `mlx_lm.sample_utils.make_sampler`.
        top_p: Sample from the likeliest tokens of this probability in all.
        min_p: Sample from tokens this likely, as a share of the likeliest.
        top_k: Sample from this number of the likeliest tokens.
        repetition_penalty: Penalty for repeated tokens of the whole prompt and the
            answer; see `mlx_lm.sample_utils.make_logits_processors`.
        repetition_context_size: How many tokens back it looks, 20 by default.
        seed: Seed for the sampling.
        sampler: A sampler in place of the one that `temp` and so on make.
        logits_processors: Called with the token ids of the whole prompt and the
            answer, shape `(tokens,)`, and the logits, shape `(1, vocabulary)`.
    """

    temp: float | None
    top_p: float | None
    min_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    repetition_context_size: int
    seed: int | None
    sampler: Sampler | None
    logits_processors: list[LogitsProcessor] | None


class GenerateOptions(SamplingOptions, ReadOptions, total=False):
    """How `stream_generate` chooses tokens, and how it reads the prompt."""


class CachedGenerator:
    """Generates like mlx-lm, resuming every prompt from its longest cached prefix.

    Trouble with the store never breaks a generation: it becomes one
    `PromptCacheWarning` and a prefill. `build` raises instead.

    Attributes:
        store: The store, or None if it cannot be used.
        save: Whether to save the prompts that are read, unless a call says otherwise.
        namespace: Prefixes are found, built, named and explained in this namespace.
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
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load a model like `mlx_lm.load` does, and wrap it.

        Args:
            path_or_hf_repo: A folder or a hub repository, else `PROMPTCACHE_MODEL`,
                else the embedded default, SmolLM2-135M-Instruct.
            adapter_path: The folder of a LoRA adapter.
            options: `store`, `max_nbytes`, `memory_limit`, `save`, `reuse`,
                `namespace`, `chat_template_config` and `announce` of
                `CachedGenerator`, and further arguments of `mlx_lm.load`. `announce`
                is called before a download as well.

        Raises:
            ModelError: The model cannot be found or loaded.
        """
        own, of_mlx_lm = _split(options, GeneratorOptions)
        model, tokenizer, identity = load.load(
            path_or_hf_repo,
            adapter_path=adapter_path,
            announce=own.get("announce"),
            **of_mlx_lm,
        )
        return cls(model, tokenizer, identity=identity, **own)

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
        """Return what the model is now; hash it if that is unknown.

        Raises ModelError if it cannot be hashed.
        """
        return self._loaded.identity

    def refresh_identity(self) -> None:
        """Hash the model and its drafts again before their next use.

        Needed after an array was changed in place (`weight[0] = 1`). Arrays, modules
        and plain attributes that were replaced are noticed without this.
        """
        self._loaded.refresh_identity()

    def fingerprint(self, settings: Settings = DEFAULT_SETTINGS) -> Fingerprint:
        """Return what KV values depend on now, besides the token ids.

        Raises ModelError if the model cannot be hashed.
        """
        return self._loaded.fingerprint(settings)

    def load_draft(self, path_or_hf_repo: str | Path) -> Any:
        """Load a draft model for `build` and `stream_generate`.

        Raises:
            ModelError: It cannot be found or loaded, or its vocabulary differs.
        """
        return self._loaded.load_draft(path_or_hf_repo, self.tokenizer.vocab_size)

    def render(
        self,
        prompt: Prompt,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Return a prompt as token ids, with the boundaries worth resuming from.

        Args:
            prompt: Text, token ids or chat messages.
            tools: Tools for the chat template.
            chat_template_config: Further arguments of the chat template, in place of
                the generator's.

        Raises:
            UsageError: The prompt is empty, or not a prompt of this model.
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
        """Return a whole prompt from its parts. Raises UsageError."""
        if parts.raw:
            return self.render(parts.text())
        messages = parts.compose(parts.prompt)
        return self.render(messages, parts.tools, parts.chat_template_config)

    def render_prefix(self, parts: PromptParts) -> RenderedPrompt:
        """Return what to build for a prompt in parts.

        Without a user's text, that is everything before it. Raises UsageError.
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
        **options: Unpack[ReadOptions],
    ) -> Match:
        """Return what a generation of this prompt would reuse.

        The last token is never part of it: the model has to read something.

        Args:
            prompt: Text, token ids or chat messages.
            tools: Tools for the chat template.
            chat_template_config: See `render`.
            options: See `ReadOptions`.

        Raises:
            UsageError: The prompt is empty, or not a prompt of this model.
            StoreError: The store cannot be read.
        """
        token_ids = self.render(prompt, tools, chat_template_config).token_ids
        fingerprint = self.fingerprint(Settings.of(**options))
        return self._usable_store().lookup(token_ids[:-1], fingerprint)

    def explain(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
        **options: Unpack[ReadOptions],
    ) -> Explanation:
        """Explain what a generation of this prompt would reuse, and why not more.

        Args:
            prompt: Text, token ids or chat messages.
            tools: Tools for the chat template.
            chat_template_config: See `render`.
            options: See `ReadOptions`.

        Raises:
            UsageError: The prompt is empty, or not a prompt of this model.
            StoreError: The store cannot be read.
        """
        rendered = self.render(prompt, tools, chat_template_config)
        fingerprint = self.fingerprint(Settings.of(**options))
        store = self._usable_store()
        nearby = store.segments.nearby(rendered.token_ids, fingerprint, rendered.origin)
        estimate = store.usage_log.estimate(fingerprint, nearby.match.cached_tokens)
        declines = estimate is not None and estimate.prefill_is_faster
        return explain.explain(
            self.tokenizer,
            rendered,
            fingerprint,
            nearby,
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
        prompt_progress_callback: Progress | None = None,
        on_wait: Callable[[], None] = lambda: None,
        **options: Unpack[ReadOptions],
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
            prompt_progress_callback: Called with tokens processed and their total.
            on_wait: Called when another process builds the same prefix.
            options: See `ReadOptions`.

        Raises:
            UnsupportedCacheError: The model's cache cannot be stored.
            UsageError: There is nothing to build.
            StoreError: The store cannot be written.
        """
        if name is not None:
            check_name(name)
        settings = Settings.of(**options)
        rendered = self._prompt_to_build(prompt, system, tools, chat_template_config)
        self._check_draft(settings, rendered)
        started = time.perf_counter()
        building = Build(
            self._loaded, self._usable_store(), self._writer, rendered, settings
        )
        cached_tokens = building.run(
            prompt_progress_callback or (lambda done, total: None), on_wait
        )
        prefix = self._built(building.key, name)
        seconds = time.perf_counter() - started
        return BuiltPrefix(
            **asdict(prefix), cached_tokens=cached_tokens, seconds=seconds
        )

    def _built(self, key: str, name: str | None) -> Prefix:
        store = self._usable_store()
        try:
            if name is not None:
                store.pin(key, name, namespace=self.namespace)
            return store.resolve(key, namespace=self.namespace)
        except KeyNotFoundError as error:
            raise StoreError(
                "what was built has been evicted by another process already"
            ) from error

    def _check_draft(self, settings: Settings, rendered: RenderedPrompt) -> None:
        """Raise UsageError for token ids that a draft model does not have."""
        draft_model = settings.draft_model
        if draft_model is not None:
            self._loaded.check_token_ids(rendered.token_ids, draft_model=draft_model)

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

    def is_built(
        self, prompt: RenderedPrompt, **options: Unpack[ReadOptions]
    ) -> tuple[str, bool]:
        """Return the key that `build` would give, and whether all of it is stored.

        Args:
            prompt: What `render` and the like returned.
            options: See `ReadOptions`.

        Raises:
            UnsupportedCacheError: The model's cache cannot be stored.
            UsageError: There is nothing to build.
            StoreError: The store cannot be read.
        """
        store = self._usable_store()
        settings = Settings.of(**options)
        building = Build(self._loaded, store, self._writer, prompt, settings)
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
        save_answer: bool = False,
        on_saved: Callable[[str], None] = lambda key: None,
        num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        input_embeddings: mx.array | None = None,
        prompt_progress_callback: Progress | None = None,
        **options: Unpack[GenerateOptions],
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
            save_answer: Save the answer, too, where the prompt is saved: as far as it
                came, and unless it depends on how it was computed (a draft model,
                exact mode, quantization that began with it).
            on_saved: Called with the key of what was saved at the end, also an early
                one.
            num_draft_tokens: See `mlx_lm.generate.speculative_generate_step`.
            input_embeddings: See `mlx_lm.generate.generate_step`; nothing is cached.
            prompt_progress_callback: Called with the prompt tokens done so far,
                cached ones included, and their total.
            options: How to choose the tokens (`temp`, `top_p`, `min_p`, `top_k`,
                `repetition_penalty`, `repetition_context_size`, `seed`, `sampler`,
                `logits_processors`; see `SamplingOptions`), and how to read the
                prompt (`kv_bits`, `exact` and so on; see `ReadOptions`).

        Raises:
            UsageError: The arguments make no sense, or mlx-lm cannot do it with this
                model.
        """
        sampling, reading = _split(options, SamplingOptions)
        settings = Settings.of(**reading)
        _check(max_tokens, sampling, settings, input_embeddings)
        rendered = self.render(prompt, tools, chat_template_config)
        self._check_draft(settings, rendered)
        sampler, logits_processors = _sampling(cast(SamplingOptions, sampling))
        request = Request(
            self._prompt_read(
                rendered, settings, save, reuse, can_be_stored=input_embeddings is None
            ),
            max_tokens=max_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            on_progress=prompt_progress_callback or (lambda done, total: None),
            num_draft_tokens=num_draft_tokens,
            save_answer=save_answer,
            on_saved=on_saved,
            input_embeddings=input_embeddings,
        )
        prefixes = PrefixCache(self.store, self._hot, self._writer)
        return Generation(self._loaded, self.tokenizer, prefixes, request).stream()

    def _prompt_read(
        self,
        rendered: RenderedPrompt,
        settings: Settings,
        save: SavePolicy | None,
        reuse: bool | None,
        *,
        can_be_stored: bool,
    ) -> PromptRead:
        return PromptRead(
            rendered.token_ids,
            self._loaded.plan(settings, rendered.boundaries, rendered.answer),
            settings,
            origin=rendered.origin,
            reuse=self._reuse if reuse is None else reuse,
            save=self.save if save is None else save,
            can_be_stored=can_be_stored,
        )


def _split(
    options: Mapping[str, Any], kind: type
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that a TypedDict has, and the others."""
    names = kind.__annotations__
    own = {name: value for name, value in options.items() if name in names}
    return own, {name: options[name] for name in options if name not in names}


def _check(
    max_tokens: int,
    sampling: Mapping[str, Any],
    settings: Settings,
    input_embeddings: mx.array | None,
) -> None:
    """Raise UsageError for what cannot be generated."""
    seed = sampling.get("seed")
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError("max_tokens must be at least 1, or -1 for no limit")
    if seed is not None and not 0 <= seed < 2**64:
        raise UsageError(f"seed must be in [0, 2**64), not {seed}")
    if settings.draft_model is not None and input_embeddings is not None:
        raise UsageError("mlx-lm takes no input_embeddings with a draft model")


def _sampling(options: SamplingOptions) -> tuple[Sampler, list[LogitsProcessor]]:
    """Return what chooses the tokens. MLX's random numbers start at the seed."""
    seed = options.get("seed")
    if seed is not None:
        mx.random.seed(seed)
    sampler = options.get("sampler") or sampler_of(
        options.get("temp"),
        options.get("top_p"),
        options.get("min_p"),
        options.get("top_k"),
    )
    penalties = penalties_of(
        options.get("repetition_penalty"), options.get("repetition_context_size", 20)
    )
    return sampler, [*penalties, *(options.get("logits_processors") or [])]
