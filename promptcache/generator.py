"""CachedGenerator: match, load, stream the rest, save."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from promptcache.engine.batch.engine import Engine, EngineLimits
from promptcache.engine.batch.results import (
    BatchResponse,
    BatchResult,
    collect,
    run_batch,
)
from promptcache.engine.build import Build, BuiltPrefix
from promptcache.engine.generation import Generation
from promptcache.engine.options import (
    GenerateOptions,
    GeneratorOptions,
    LoadOptions,
    check_draft,
    request_of,
    split_options,
)
from promptcache.engine.request import Progress, ignore_progress
from promptcache.engine.response import GenerationResponse
from promptcache.errors import PromptCacheError, StoreError, warn
from promptcache.explain.explain import explain_prompt
from promptcache.explain.lint import VolatileText, find_volatile_text
from promptcache.explain.types import Explanation
from promptcache.models import load
from promptcache.models.identity.identity import ModelIdentity
from promptcache.models.settings import ReadOptions
from promptcache.models.text_model import TextModel
from promptcache.prompts.chat import Message
from promptcache.prompts.render import Prompt, RenderedPrompt
from promptcache.segments.types import Match
from promptcache.store import PrefixStore
from promptcache.store.reports import check_name
from promptcache.tiers import memory_limits
from promptcache.tiers.background_writer import BackgroundWriter
from promptcache.tiers.memory_tier import MemoryTier
from promptcache.tiers.prefix_cache import PrefixCache
from promptcache.tiers.prompt_read import SavePolicy


class CachedGenerator(TextModel):
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
        max_daily_nbytes: int | None = None,
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
            max_nbytes: Size limit of a store opened here; this and the next one as in
                `PrefixStore`.
            max_daily_nbytes: Most bytes to write to it in a day.
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
        super().__init__(
            model,
            tokenizer,
            namespace=namespace,
            chat_template_config=chat_template_config,
            identity=identity,
            announce=announce,
        )
        self.store: PrefixStore | None = None
        self.save: SavePolicy = save
        self._reuse = reuse
        self._writer = BackgroundWriter()
        self._memory = MemoryTier(memory_limits.cache_limit(memory_limit))
        self._store_error: StoreError | None = None
        self._owns_store = not isinstance(store, PrefixStore)
        if isinstance(store, PrefixStore):
            self.store = store
        elif reuse or save:
            self._open_store(store, max_nbytes, max_daily_nbytes)

    def _open_store(
        self,
        path: str | Path | None,
        max_nbytes: int | None,
        max_daily_nbytes: int | None,
    ) -> None:
        try:
            self.store = PrefixStore(
                path, max_nbytes=max_nbytes, max_daily_nbytes=max_daily_nbytes
            )
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
            options: Those of `CachedGenerator` but for `identity`, and further
                arguments of `mlx_lm.load`. `announce` is called before a download, too.

        Raises:
            ModelError: The model cannot be found or loaded.
        """
        own, of_mlx_lm = split_options(options, GeneratorOptions)
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
        self._memory.clear()
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
        fingerprint = self.fingerprint(self.settings(**options))
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

        Takes and raises what `match` does.
        """
        rendered = self.render(prompt, tools, chat_template_config)
        fingerprint = self.fingerprint(self.settings(**options))
        store = self._usable_store()
        return explain_prompt(store, self.tokenizer, rendered, fingerprint)

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
        settings = self.settings(**options)
        rendered = self.render_whole(prompt, system, tools, chat_template_config)
        check_draft(self, settings, rendered)
        build = Build(
            self.loaded, self._usable_store(), self._writer, rendered, settings
        )
        return build.run(name, prompt_progress_callback or ignore_progress, on_wait)

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
        settings = self.settings(**options)
        build = Build(self.loaded, store, self._writer, prompt, settings)
        return build.key, build.is_stored()

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
            prompt_progress_callback: Called with the prompt tokens done so far,
                cached ones included, and their total.
            options: What to reuse and to save (`save`, `reuse`, `save_answer` and so
                on; see `GenerateOptions`), how to choose the tokens (`temp`, `top_p`,
                `seed` and so on; see `SamplingOptions`), and how to read the prompt
                (`kv_bits`, `exact` and so on; see `ReadOptions`).

        Raises:
            UsageError: The arguments make no sense, or mlx-lm cannot do it with this
                model.
        """
        request = request_of(
            self,
            self.render(prompt, tools, chat_template_config),
            max_tokens,
            options,
            save=self.save,
            reuse=self._reuse,
            on_progress=prompt_progress_callback or ignore_progress,
        )
        prefixes = self._prefixes()
        return Generation(self.loaded, self.tokenizer, prefixes, request).stream()

    def _prefixes(self) -> PrefixCache:
        return PrefixCache(self.store, self._memory, self._writer)

    def engine(self, **limits: Unpack[EngineLimits]) -> Engine:
        """Return an engine, which runs many requests at once; see `EngineLimits`."""
        prefixes = self._prefixes()
        return Engine(self, prefixes, save=self.save, reuse=self._reuse, **limits)

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int | Sequence[int] = 128,
        *,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[BatchResult]:
        """Answer prompts together, and yield the result of each when it is done.

        Prefixes that they share are read once. What is wrong with a prompt is its
        result's error.

        Args:
            prompts: As `stream_generate` takes them.
            max_tokens: Most tokens of an answer, of each prompt if it is a list.
            tools: Tools for the chat template.
            chat_template_config: See `render`.
            options: As `stream_generate` takes them, for all prompts.
        """

        def rendered(prompt: Prompt) -> RenderedPrompt | PromptCacheError:
            try:
                return self.render(prompt, tools, chat_template_config)
            except PromptCacheError as error:
                return error

        if isinstance(max_tokens, int):
            max_tokens = [max_tokens] * len(prompts)
        whole = [*map(rendered, prompts)]
        return run_batch(self.engine(), self, whole, max_tokens, options)

    def batch_generate(
        self, prompts: Sequence[Prompt], *args: Any, **options: Any
    ) -> BatchResponse:
        """Answer prompts together, like `mlx_lm.batch_generate`.

        Takes what `stream_batch` takes. Raises the first error of a prompt.
        """
        return collect(self.stream_batch(prompts, *args, **options), len(prompts))
