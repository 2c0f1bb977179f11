"""Settings: what KV values depend on besides the model and the token ids."""

from dataclasses import dataclass, field
from typing import Any, Self

from promptcache.errors import UsageError
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.kvcache.row_quantization import STORE_BITS
from promptcache.models.prefill_plan import DEFAULT_STEP_SIZE


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
        store_bits: In how many bits keys and values are stored, None for those that
            they have in memory.
    """

    kv: KVSettings = field(default_factory=KVSettings)
    max_kv_size: int | None = None
    exact: bool | None = None
    step_size: int = DEFAULT_STEP_SIZE
    draft_model: Any = None
    store_bits: int | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for what contradicts itself."""
        if self.store_bits is None:
            return
        if self.store_bits not in STORE_BITS:
            raise UsageError(
                f"store_bits must be one of {STORE_BITS}, not {self.store_bits}"
            )
        if self.kv.bits is not None:
            raise UsageError(
                "use just one of kv_bits and store_bits: KV that is quantized already "
                "is stored as it is"
            )
        if self.exact:
            raise UsageError(
                "use just one of exact and store_bits: what is stored in fewer bits "
                "is not restored to the bit"
            )

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
        store_bits: int | None = None,
    ) -> Self:
        """Return the settings that arguments of `stream_generate` mean.

        Raises:
            UsageError: mlx cannot quantize to this, or they contradict each other.
        """
        kv = KVSettings(kv_bits, kv_group_size, quantized_kv_start)
        return cls(kv, max_kv_size, exact, prefill_step_size, draft_model, store_bits)


DEFAULT_SETTINGS = Settings()
