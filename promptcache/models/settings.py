"""Settings: what KV values depend on besides the model and the token ids."""

from dataclasses import dataclass, field
from typing import Any, Self, TypedDict

from promptcache.errors import UsageError
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.kvcache.row_quantization import STORE_BITS
from promptcache.models.prefill_plan import DEFAULT_STEP_SIZE


class ReadOptions(TypedDict, total=False):
    """How to read a prompt; what is stored with some of these is found with the same.

    Attributes:
        kv_bits: Quantize keys and values to 2, 3, 4, 5, 6 or 8 bits; this and the
            next three as in `mlx_lm.generate.generate_step`.
        kv_group_size: How many values share a scale: 32, 64 (default) or 128.
        quantized_kv_start: Quantize from this number of tokens on, 5000 by default.
        max_kv_size: Most tokens to keep in the cache; see `make_prompt_cache`.
        exact: Reuse only where plain mlx-lm's own prefill pieces end, so that a run
            repeats its arithmetic, piece for piece. None (default): only where the
            model's values depend on the length of what is read.
        prefill_step_size: Most prompt tokens to process at once, 2048 by default, and
            to lose when a build is interrupted.
        draft_model: A smaller model that reads the prompt, too, for speculative
            decoding; see `mlx_lm.stream_generate`. Both models' caches are reused.
        store_bits: Store keys and values in 8 or 4 bits, and reuse what is stored so.
            It takes half or a quarter of 16 bits, and restores nearly the same values.
            What is stored exactly is used where it reaches as far.
        namespace: Overrides the generator's namespace.
    """

    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    max_kv_size: int | None
    exact: bool | None
    prefill_step_size: int
    draft_model: Any
    store_bits: int | None
    namespace: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run reads its prompt: `ReadOptions`, checked, and in which namespace."""

    kv: KVSettings = field(default_factory=KVSettings)
    max_kv_size: int | None = None
    exact: bool | None = None
    step_size: int = DEFAULT_STEP_SIZE
    draft_model: Any = None
    store_bits: int | None = None
    namespace: str = ""

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
        namespace: str = "",
    ) -> Self:
        """Return the settings that `ReadOptions` mean.

        Raises:
            UsageError: mlx cannot quantize to this, or they contradict each other.
        """
        kv = KVSettings(kv_bits, kv_group_size, quantized_kv_start)
        return cls(
            kv,
            max_kv_size,
            exact,
            prefill_step_size,
            draft_model,
            store_bits,
            namespace,
        )


DEFAULT_SETTINGS = Settings()
