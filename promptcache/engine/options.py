"""The options of a generator and of its generations, as keyword arguments."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import mlx.core as mx

from promptcache.engine.sampling import SamplingOptions
from promptcache.models.settings import ReadOptions
from promptcache.store import PrefixStore
from promptcache.tiers.prompt_read import SavePolicy


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
        num_draft_tokens: See `mlx_lm.generate.speculative_generate_step`; 2 by default.
        input_embeddings: See `mlx_lm.generate.generate_step`; nothing is cached.
    """

    save: SavePolicy | None
    reuse: bool | None
    save_answer: bool
    on_saved: Callable[[str], None]
    num_draft_tokens: int
    input_embeddings: mx.array | None


def split_options(
    options: Mapping[str, Any], kind: type
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that a TypedDict has, and the others."""
    names = kind.__annotations__
    own = {name: value for name, value in options.items() if name in names}
    return own, {name: options[name] for name in options if name not in names}
