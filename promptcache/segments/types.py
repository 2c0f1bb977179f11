"""The values that describe segments, all frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from promptcache.segments.dtypes import nbytes_of
from promptcache.segments.fingerprint import Fingerprint


@dataclass(frozen=True, slots=True)
class PromptOrigin:
    """How a chat prompt was rendered, so that two can be compared.

    Attributes:
        template: Hash of the chat template.
        config: The template's further arguments.
        system: Hash of the system prompt's text, empty without one.
        tools: Name and hash of each tool.
        head: Number of tokens before the first user's text.
    """

    template: str
    config: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    tools: tuple[tuple[str, str], ...] = ()
    head: int = field(default=0, compare=False)


class SegmentSlice(NamedTuple):
    """The rows `[start, stop)` of a segment `[start, end)`, of a checkpoint none."""

    key: str
    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix of a prompt.

    Attributes:
        slices: The segments to load, from the root; each starts where the
            one before it stops. A checkpoint, if there is one, is the last.
    """

    slices: tuple[SegmentSlice, ...] = ()

    @property
    def cached_tokens(self) -> int:
        """Return the length of the matched prefix in tokens."""
        return self.slices[-1].stop if self.slices else 0

    @property
    def ends_in_checkpoint(self) -> bool:
        """Return whether a run resumes from a state, and not from rows alone."""
        return bool(self.slices) and self.slices[-1].start == self.slices[-1].end

    @property
    def key(self) -> str | None:
        """Return the key of the deepest segment with rows, or None without one."""
        keys = [part.key for part in self.slices if part.start < part.end]
        return keys[-1] if keys else None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as plain bytes.

    `dtype` is in safetensors' spelling, such as `BF16`; `data` is contiguous, row-major
    and little-endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class TensorSpec(NamedTuple):
    """A tensor as a blob's header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of its values."""
        return nbytes_of(self.dtype, self.shape)


class ResumeRules(NamedTuple):
    """Where a run can resume from a segment.

    Attributes:
        sliceable: Whether its rows can be cut at any token, else it is used as a
            whole or not at all.
        needs_checkpoint: Whether rows are not enough, so that only positions with a
            checkpoint will do.
    """

    sliceable: bool = True
    needs_checkpoint: bool = False


AT_ANY_TOKEN = ResumeRules()


class Priority(IntEnum):
    """Which checkpoints stay longer, the higher ones, when some have to go."""

    STEP = 0
    BOUNDARY = 1
    # Where the answer to a prompt begins in history.
    ANSWER = 2
    BUILT = 3


# The tag of a checkpoint's key; those of segments with rows have none.
CHECKPOINT_TAG = "checkpoint"


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """The segment `[start, end)`, as its blob describes it.

    Attributes:
        key: Chain hash at `end`, in hex.
        start_hash: Chain hash at `start`, in hex, which names the parent whatever
            segment has it; of a root, the fingerprint's digest.
        is_prefix: Whether a prompt that was built or saved ends here.
        created_at: Unix time.
        priority: Of checkpoints only, whose start and end are the same.
    """

    key: str
    start_hash: str
    fingerprint: Fingerprint
    start: int
    end: int
    is_prefix: bool
    created_at: float
    resumption: ResumeRules = AT_ANY_TOKEN
    priority: Priority = Priority.STEP

    @property
    def is_checkpoint(self) -> bool:
        """Return whether it is the state at one position, without rows."""
        return self.start == self.end

    @property
    def tag(self) -> str:
        """Return the tag of its key; see `Chain.tagged_key_at`."""
        return CHECKPOINT_TAG if self.is_checkpoint else ""


class EncodedSegment(NamedTuple):
    """The state of a token range as the codec encodes it."""

    layout: str
    tensors: list[Tensor]
    resumption: ResumeRules = AT_ANY_TOKEN

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tensors."""
        return sum(tensor.data.nbytes for tensor in self.tensors)

    @property
    def specs(self) -> list[TensorSpec]:
        """Return its tensors as a blob's header describes them."""
        return [TensorSpec(t.name, t.dtype, t.shape) for t in self.tensors]
