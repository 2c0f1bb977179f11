"""The options of a generator and of its generations: keyword arguments, checked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import mlx.core as mx

from promptcache.engine.request import Progress, Request
from promptcache.engine.sampling import SamplingOptions, sampling_of
from promptcache.errors import UsageError
from promptcache.models.settings import ReadOptions, Settings
from promptcache.models.text_model import TextModel
from promptcache.prompts.render import RenderedPrompt
from promptcache.store import PrefixStore
from promptcache.tiers.prompt_read import PromptRead, SavePolicy


class GeneratorOptions(TypedDict, total=False):
    """Keyword arguments of `CachedGenerator`, where they are documented."""

    store: PrefixStore | str | Path | None
    max_nbytes: int | None
    max_daily_nbytes: int | None
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


class GenerateOptions(SamplingOptions, ReadOptions, total=False):
    """Options of `stream_generate`, besides those of sampling and reading.

    Attributes:
        save: Overrides the generator's policy.
        reuse: Overrides whether to look for cached prefixes.
        save_answer: Save the answer, too, where the prompt is saved: as far as it came,
            and unless it depends on how it was computed (a draft model, exact mode,
            quantization that began with it).
        on_saved: Called with the key of what was saved at the end, also an early one.
        on_recorded: With an `Engine`, called on another thread with how long it would
            have taken to read what was cached.
        num_draft_tokens: See `mlx_lm.generate.speculative_generate_step`; 2 by default.
        input_embeddings: See `mlx_lm.generate.generate_step`; nothing is cached.
    """

    save: SavePolicy | None
    reuse: bool | None
    save_answer: bool
    on_saved: Callable[[str], None]
    on_recorded: Callable[[float], None]
    num_draft_tokens: int
    input_embeddings: mx.array | None


def split_options(
    options: Mapping[str, Any], kind: type
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that a TypedDict has, and the others."""
    names = kind.__annotations__
    own = {name: value for name, value in options.items() if name in names}
    return own, {name: options[name] for name in options if name not in names}


def request_of(
    model: TextModel,
    prompt: RenderedPrompt,
    max_tokens: int,
    options: Mapping[str, Any],
    *,
    save: SavePolicy,
    reuse: bool,
    on_progress: Progress,
) -> Request:
    """Return what `GenerateOptions` ask for. Raises UsageError.

    Args:
        model: The model.
        prompt: The prompt.
        max_tokens: Most tokens to generate, -1 for no limit.
        options: The options.
        save: Whether to save the prompt, unless they say otherwise.
        reuse: Whether to look for cached prefixes, unless they say otherwise.
        on_progress: Called with the prompt tokens done so far and their total.
    """
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError("max_tokens must be at least 1, or -1 for no limit")
    sampling, options_left = split_options(options, SamplingOptions)
    reading, caching = split_options(options_left, ReadOptions)
    settings = model.settings(**cast(ReadOptions, reading))
    own_save, own_reuse = caching.pop("save", None), caching.pop("reuse", None)
    is_embedded = caching.get("input_embeddings") is not None
    if settings.draft_model is not None and is_embedded:
        raise UsageError("mlx-lm takes no input_embeddings with a draft model")
    check_draft(model, settings, prompt)
    read = PromptRead(
        prompt.token_ids,
        model.loaded.plan(settings, prompt.boundaries, prompt.answer),
        settings,
        origin=prompt.origin,
        reuse=reuse if own_reuse is None else own_reuse,
        save=save if own_save is None else own_save,
        can_be_stored=not is_embedded,
    )
    sampler, processors = sampling_of(cast(SamplingOptions, sampling))
    return Request(
        read, max_tokens, sampler, processors, on_progress=on_progress, **caching
    )


def check_draft(model: TextModel, settings: Settings, prompt: RenderedPrompt) -> None:
    """Raise UsageError for token ids that a draft model does not have."""
    draft_model = settings.draft_model
    if draft_model is not None:
        model.loaded.check_token_ids(prompt.token_ids, draft_model=draft_model)
