"""CachedGenerator: match, load, stream the rest, save."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from promptcache import codec, loading, rendering
from promptcache.decoding import LogitsProcessor, Sampler
from promptcache.errors import StoreError, UsageError
from promptcache.fingerprint import make_fingerprint
from promptcache.generation import (
    Generation,
    GenerationResponse,
    Progress,
    Request,
    SavePolicy,
)
from promptcache.prefill import DEFAULT_STEP_SIZE, Cuts, KVSettings, prefill
from promptcache.resuming import checked, resume
from promptcache.saving import Saver, warn
from promptcache.store import PrefixStore, check_name
from promptcache.types import Fingerprint, Match, Prefix

# Arguments of mlx-lm's functions that are passed on as they are.
FURTHER_OPTIONS = {
    "draft_model",
    "input_embeddings",
    "max_kv_size",
    "num_draft_tokens",
}


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
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        store: PrefixStore | str | Path | None = None,
        max_nbytes: int | None = None,
        save: SavePolicy = "auto",
        reuse: bool = True,
        namespace: str = "",
        identity: loading.ModelIdentity | None = None,
    ) -> None:
        """Wrap a model that is loaded already.

        Args:
            model: A model of mlx-lm.
            tokenizer: Its tokenizer.
            store: A store to share, or the folder of one to open; the default
                folder if None.
            max_nbytes: Size limit of a store opened here; see `PrefixStore`.
            save: Whether to save the prompts that are read: True for all, "auto" for
                those with at least 512 new tokens.
            reuse: Whether to look for cached prefixes.
            namespace: Prefixes are found only under the namespace they were saved in.
            identity: What the model is, if known; else its parameters are hashed
                on first use.
        """
        self.model = model
        if not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        self.tokenizer = tokenizer
        self.store: PrefixStore | None = None
        self._save: SavePolicy = save
        self._reuse = reuse
        self._namespace = namespace
        self._identity = identity
        self._fingerprints: dict[KVSettings, Fingerprint] = {}
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
        save: SavePolicy = "auto",
        reuse: bool = True,
        namespace: str = "",
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
            save: See `CachedGenerator`.
            reuse: See `CachedGenerator`.
            namespace: See `CachedGenerator`.
            announce: Called with a line for people before something takes long.
            kwargs: Further arguments of `mlx_lm.load`.

        Raises:
            ModelError: The model cannot be found or loaded.
        """
        model, tokenizer, identity = loading.load(
            path_or_hf_repo, adapter_path=adapter_path, announce=announce, **kwargs
        )
        return cls(
            model,
            tokenizer,
            store=store,
            max_nbytes=max_nbytes,
            save=save,
            reuse=reuse,
            namespace=namespace,
            identity=identity,
        )

    def close(self) -> None:
        """Close the store, unless it was handed in."""
        if self.store is not None and self._owns_store:
            self.store.close()
            self.store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def fingerprint(self, kv: KVSettings | None = None) -> Fingerprint:
        """Return what KV values depend on, besides the token ids."""
        kv = kv or KVSettings()
        if kv.bits is None:
            # Group size and start mean nothing without bits.
            kv = KVSettings()
        if kv not in self._fingerprints:
            if self._identity is None:
                self._identity = loading.identify(self.model)
            parts = {
                **self._identity.parts,
                "kv_bits": str(kv.bits or ""),
                "kv_group_size": str(kv.group_size if kv.bits else ""),
                "quantized_kv_start": str(kv.start if kv.bits else ""),
                "layout": loading.hash_layout(make_prompt_cache(self.model)),
                "namespace": self._namespace,
            }
            self._fingerprints[kv] = make_fingerprint(
                parts, model=self._identity.name, source=self._identity.source
            )
        return self._fingerprints[kv]

    def match(
        self,
        prompt: rendering.Prompt,
        *,
        tools: Sequence[rendering.Message] | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
    ) -> Match:
        """Return what a generation of this prompt would reuse.

        The last token is never part of it: the model has to read something.

        Raises:
            UsageError: The prompt is empty, or no prompt.
            StoreError: The store cannot be read.
        """
        token_ids, _ = rendering.render_prompt(self.tokenizer, prompt, tools=tools)
        kv = KVSettings(kv_bits, kv_group_size, quantized_kv_start)
        store = self._usable_store()
        return store.lookup(token_ids, self.fingerprint(kv), limit=len(token_ids) - 1)

    def _usable_store(self) -> PrefixStore:
        if self.store is None:
            raise self._store_error or StoreError("this generator has no store")
        return self.store

    # Building

    def build(
        self,
        prompt: rendering.Prompt | None = None,
        *,
        system: str | None = None,
        tools: Sequence[rendering.Message] | None = None,
        name: str | None = None,
        prefill_step_size: int = DEFAULT_STEP_SIZE,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
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
            name: Pin the prefix under this name.
            prefill_step_size: Most tokens to process at once, and to lose when
                interrupted.
            kv_bits: See `mlx_lm.generate.generate_step`.
            kv_group_size: See `mlx_lm.generate.generate_step`.
            quantized_kv_start: See `mlx_lm.generate.generate_step`.
            prompt_progress_callback: Called with tokens processed and their total.
            on_wait: Called when another process builds the same prefix.

        Raises:
            UnsupportedCacheError: The model's cache cannot be stored.
            UsageError: There is nothing to build.
            StoreError: The store cannot be written.
        """
        token_ids, boundaries = self._prompt_to_build(prompt, system, tools)
        kv = KVSettings(kv_bits, kv_group_size, quantized_kv_start)
        if name is not None:
            check_name(name)
        cache = make_prompt_cache(self.model)
        codec.check_supported(cache)
        store = self._usable_store()
        fingerprint = self.fingerprint(kv)
        started = time.perf_counter()
        with store.building(store.key_of(token_ids, fingerprint), on_wait):
            match = checked(store, store.lookup(token_ids, fingerprint))
            cuts = Cuts(prefill_step_size, boundaries)
            if match.cached_tokens < len(token_ids):
                match = resume(store, match, cache, token_ids, cuts=cuts, kv=kv)
            saver = Saver(store, fingerprint, token_ids, cache)
            with wired_limit(self.model, [generation_stream]):
                prefill(
                    self.model,
                    cache,
                    token_ids,
                    start=match.cached_tokens,
                    end=len(token_ids),
                    cuts=cuts,
                    kv=kv,
                    on_piece=lambda _, stop: saver.save(stop),
                    on_progress=prompt_progress_callback,
                )
            # Lists the prefix also where nothing was missing.
            key = saver.save(len(token_ids))
        if name is not None:
            store.pin(key, name)
        return BuiltPrefix(
            **asdict(store.resolve(key)),
            cached_tokens=match.cached_tokens,
            seconds=time.perf_counter() - started,
        )

    def _prompt_to_build(
        self,
        prompt: rendering.Prompt | None,
        system: str | None,
        tools: Sequence[rendering.Message] | None,
    ) -> rendering.RenderedPrompt:
        if prompt is None:
            if system is None and not tools:
                raise UsageError("there is nothing to build, give a prompt or a system")
            return rendering.RenderedPrompt(
                rendering.stable_prefix(
                    lambda text: rendering.render(
                        self.tokenizer,
                        rendering.compose(system=system, user=text),
                        tools=tools,
                    )
                )
            )
        if isinstance(prompt, str) and (system is not None or tools):
            prompt = rendering.compose(system=system, user=prompt)
        elif rendering.is_messages(prompt):
            prompt = rendering.compose(system=system, messages=prompt)
        return rendering.render_prompt(self.tokenizer, prompt, tools=tools)

    # Generating

    def generate(self, prompt: rendering.Prompt, **kwargs: Any) -> str:
        """Return the whole answer; see `stream_generate`."""
        return "".join(r.text for r in self.stream_generate(prompt, **kwargs))

    def stream_generate(
        self,
        prompt: rendering.Prompt,
        max_tokens: int = 256,
        *,
        tools: Sequence[rendering.Message] | None = None,
        save: SavePolicy | None = None,
        reuse: bool | None = None,
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
        prompt_progress_callback: Progress | None = None,
        **kwargs: Any,
    ) -> Generator[GenerationResponse, None, None]:
        """Generate token by token, like `mlx_lm.stream_generate`.

        The answer is never saved. Closing the generator early saves the prompt all
        the same, if the policy says so and it was read in full.

        Args:
            prompt: Text, token ids or chat messages.
            max_tokens: Most tokens to generate, -1 for no limit.
            tools: Tools for the chat template.
            save: Overrides the generator's policy.
            reuse: Overrides whether to look for cached prefixes.
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
            prompt_progress_callback: Called with the prompt tokens done so far,
                cached ones included, and their total.
            kwargs: `max_kv_size`, `draft_model`, `num_draft_tokens` and
                `input_embeddings` of mlx-lm, with which nothing is cached.

        Raises:
            UsageError: The arguments make no sense.
        """
        if max_tokens == 0 or max_tokens < -1:
            raise UsageError("max_tokens must be at least 1, or -1 for no limit")
        if seed is not None and not 0 <= seed < 2**64:
            raise UsageError(f"seed must be in [0, 2**64), not {seed}")
        _check_options(kwargs)
        if seed is not None:
            mx.random.seed(seed)
        rendered = rendering.render_prompt(self.tokenizer, prompt, tools=tools)
        request = Request(
            token_ids=rendered.token_ids,
            max_tokens=max_tokens,
            save=self._save if save is None else save,
            reuse=self._reuse if reuse is None else reuse,
            sampler=sampler or _sampler(temp, top_p, min_p, top_k),
            logits_processors=[
                *_penalty(repetition_penalty, repetition_context_size),
                *(logits_processors or []),
            ],
            cuts=Cuts(prefill_step_size, rendered.boundaries),
            kv=KVSettings(kv_bits, kv_group_size, quantized_kv_start),
            on_progress=prompt_progress_callback or (lambda done, total: None),
            options=kwargs,
        )
        return Generation(
            self.model, self.tokenizer, self.store, self.fingerprint, request
        ).stream()


def _check_options(options: Mapping[str, Any]) -> None:
    if "prompt_cache" in options:
        raise UsageError("prompt_cache is what CachedGenerator takes care of")
    for name in options.keys() - FURTHER_OPTIONS:
        raise TypeError(f"stream_generate() got an unexpected argument {name!r}")


def _penalty(penalty: float | None, context_size: int) -> list[LogitsProcessor]:
    try:
        processors: list[LogitsProcessor] = make_logits_processors(
            repetition_penalty=penalty, repetition_context_size=context_size
        )
    except ValueError as error:
        raise UsageError(f"cannot penalize: {error}".rstrip(".")) from error
    return processors


def _sampler(
    temp: float | None, top_p: float | None, min_p: float | None, top_k: int | None
) -> Sampler:
    sampler: Sampler = make_sampler(
        temp or 0.0, top_p or 0.0, min_p or 0.0, top_k=top_k or 0
    )
    return sampler
