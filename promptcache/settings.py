"""Settings: what KV values depend on besides the model and the token ids."""

from dataclasses import dataclass, field
from typing import Any, Self

from promptcache.prefill import DEFAULT_STEP_SIZE, KVSettings


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run reads its prompt; names in `of` are mlx-lm's.

    Attributes:
        kv: How keys and values are quantized.
        max_kv_size: Most tokens to keep in the cache; see `make_prompt_cache`.
        exact: Reuse only where plain mlx-lm's own prefill pieces end. None: only where
            the model's values depend on the length of what is read.
        step_size: Most prompt tokens to process at once.
        draft_model: A smaller model that reads the prompt, too.
    """

    kv: KVSettings = field(default_factory=KVSettings)
    max_kv_size: int | None = None
    exact: bool | None = None
    step_size: int = DEFAULT_STEP_SIZE
    draft_model: Any = None

    @classmethod
    def of(
        cls,
        *,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        max_kv_size: int | None = None,
        exact: bool | None = None,
        prefill_step_size: int = DEFAULT_STEP_SIZE,
        draft_model: Any = None,
    ) -> Self:
        """Return the settings that arguments of `stream_generate` mean.

        Raises:
            UsageError: mlx cannot quantize to this.
        """
        kv = KVSettings(kv_bits, kv_group_size, quantized_kv_start)
        return cls(kv, max_kv_size, exact, prefill_step_size, draft_model)


DEFAULT_SETTINGS = Settings()
