"""The values that cross modules, all frozen."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything besides the token ids that KV values depend on.

    Attributes:
        digest: 32 hex digits over `parts`, the first parent of every chain hash.
        model: The model's name for people; not part of the digest.
        source: The folder or hub repository it was loaded from, or None.
        parts: What the digest covers, by name, so that two can be compared.
        exact: Where rows are stored in fewer bits, the fingerprint of the same rows
            without loss, which are reused as well.
    """

    digest: str
    model: str
    source: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    exact: "Fingerprint | None" = field(default=None, compare=False)

    @property
    def namespace(self) -> str:
        """Return the namespace that it belongs to, empty for the default one."""
        return str(self.parts.get("namespace", ""))

    @property
    def reusable(self) -> "tuple[Fingerprint, ...]":
        """Return the fingerprints whose rows are reused, the best ones first."""
        alone = self if self.exact is None else replace(self, exact=None)
        return (alone,) if self.exact is None else (self.exact, alone)


@dataclass(frozen=True, slots=True)
class Origin:
    """How a chat prompt was rendered, so that two can be compared.

    Attributes:
        template: Hash of the chat template.
        config: Its further arguments.
        system: Hash of the system prompt's text, empty without one.
        tools: Name and hash of each tool.
        head: How many tokens come before the first user's text.
    """

    template: str
    config: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    tools: tuple[tuple[str, str], ...] = ()
    head: int = field(default=0, compare=False)


class SegmentSlice(NamedTuple):
    """The rows `[start, stop)` to take from the segment `[start, end)`.

    A checkpoint has no rows: its start, stop and end are the same.
    """

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
        has_logits: Whether the checkpoint tells the logits of the next token, so that
            nothing is left to read.
    """

    slices: tuple[SegmentSlice, ...] = ()
    has_logits: bool = False

    @property
    def cached_tokens(self) -> int:
        """Return the length of the matched prefix in tokens."""
        return self.slices[-1].stop if self.slices else 0

    @property
    def ends_in_checkpoint(self) -> bool:
        """Return whether a run takes over from a state, and not from rows alone."""
        return bool(self.slices) and self.slices[-1].start == self.slices[-1].end

    @property
    def key(self) -> str | None:
        """Return the key of the deepest segment with rows, or None without one."""
        keys = [part.key for part in self.slices if part.start < part.end]
        return keys[-1] if keys else None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as plain bytes.

    Attributes:
        name: Its name in the blob.
        dtype: Its dtype in safetensors' spelling, such as `BF16`.
        shape: Its shape.
        data: Its bytes, contiguous, row-major, little-endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@functools.cache
def bits_of(dtype: str) -> int:
    """Return the size of a value of a dtype in safetensors' spelling."""
    return int("".join(c for c in dtype if c.isdigit())) if dtype != "BOOL" else 8


@functools.lru_cache(maxsize=1024)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * bits_of(dtype) // 8


class TensorSpec(NamedTuple):
    """What a blob's header says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return how many bytes its values take."""
        return _nbytes(self.dtype, self.shape)


class Resumption(NamedTuple):
    """Where a run can take over from a segment.

    Attributes:
        divisible: Whether its rows can be cut at any token, else it is taken as a
            whole or not at all.
        extendable: Whether longer prompts can go on from its end, else it is good for
            its very prompt.
        needs_checkpoint: Whether rows are not enough, so that only positions with a
            checkpoint will do.
        has_logits: Whether a checkpoint tells the logits of the next token.
    """

    divisible: bool = True
    extendable: bool = True
    needs_checkpoint: bool = False
    has_logits: bool = False


AT_ANY_TOKEN = Resumption()


class Worth(IntEnum):
    """How much a checkpoint is worth when some are to be given up."""

    STEP = 0
    BOUNDARY = 1
    # Where the answer to a prompt begins in history.
    ANSWER = 2
    BUILT = 3


def tag_of(resumption: Resumption, *, is_checkpoint: bool) -> str:
    """Return what tells a segment's key from others' that end at the same position."""
    kinds = {
        "checkpoint": is_checkpoint,
        "logits": resumption.has_logits,
        "tail": not resumption.extendable,
    }
    return " ".join(kind for kind, applies in kinds.items() if applies)


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """What a blob says of its segment.

    Attributes:
        key: Chain hash at `end`, in hex.
        start_hash: Chain hash at `start`, in hex, which names the parent whatever
            segment has it; of a root, the fingerprint's digest.
        fingerprint: What the KV values depend on.
        start: First token of the range `[start, end)`; a checkpoint's start and end
            are the same.
        end: The token after the last.
        is_prefix: Whether a prompt that was built or saved ends here.
        created_at: Unix time.
        resumption: Where a run can take over.
        worth: How much a checkpoint is worth against others; of checkpoints only.
    """

    key: str
    start_hash: str
    fingerprint: Fingerprint
    start: int
    end: int
    is_prefix: bool
    created_at: float
    resumption: Resumption = AT_ANY_TOKEN
    worth: Worth = Worth.STEP

    @property
    def is_checkpoint(self) -> bool:
        """Return whether it is the state at one position, without rows."""
        return self.start == self.end

    @property
    def tag(self) -> str:
        """Return what tells its key from that of a common segment with its end."""
        return tag_of(self.resumption, is_checkpoint=self.is_checkpoint)


class EncodedSegment(NamedTuple):
    """The state of a token range as the codec hands it over: layout and tensors."""

    layout: str
    tensors: list[Tensor]
    resumption: Resumption = AT_ANY_TOKEN

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tensors."""
        return sum(tensor.data.nbytes for tensor in self.tensors)

    @property
    def specs(self) -> "list[TensorSpec]":
        """Return what a blob's header will say of its tensors."""
        return [TensorSpec(t.name, t.dtype, t.shape) for t in self.tensors]


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """The verified header of a blob.

    Attributes:
        info: The segment.
        layout: The layers' layout, which only the codec understands.
        tensors: The tensors in the order of their bytes.
        data_checksum: Of the data; see `checksum.combined`.
        data_start: Where the data begins in the file.
        versions: Of what computed it.
    """

    info: SegmentInfo
    layout: str
    tensors: tuple[TensorSpec, ...]
    data_checksum: str
    data_start: int
    versions: Mapping[str, str] = field(default_factory=dict)


class SegmentRow(NamedTuple):
    """A segment as the index knows it; `token_ids` are little-endian uint32."""

    id: int
    key: str
    parent_id: int
    start: int
    end: int
    nbytes: int
    divisible: bool
    extendable: bool
    needs_checkpoint: bool
    token_ids: bytes


class CheckpointRow(NamedTuple):
    """A checkpoint as the index knows it; it hangs on the segment `parent_id`."""

    key: str
    parent_id: int
    position: int
    extendable: bool
    has_logits: bool
    worth: Worth
    is_prefix: bool


class ListedPrefix(NamedTuple):
    """A prefix and the segment it ends in, as the index lists it.

    `manifest` is the file whose prompt it is pinned for, if any.
    """

    key: str
    segment_key: str
    num_tokens: int
    name: str | None
    manifest: str | None = None
    namespace: str = ""


class Leaf(NamedTuple):
    """What eviction has to know of a stretch of a segment.

    Attributes:
        id: Of the stretch.
        key: Of the segment.
        parent_id: The stretch that it goes on from, 0 for the root.
        nbytes: What its removal frees.
        used_at: When it was used last.
        pinned: Whether a prefix that ends with it has a name.
        model: The model's name.
        is_checkpoint: Whether it is a checkpoint.
        start: Where it begins.
        end: Where it ends.
        segment_id: Of the segment.
        cut_at: Where its segment ends once it is gone, None if nothing is left.
        needs_checkpoint: Whether rows are of use only up to a checkpoint.
    """

    id: int
    key: str
    parent_id: int
    nbytes: int
    used_at: float
    pinned: bool
    model: str
    is_checkpoint: bool = False
    start: int = 0
    end: int = 0
    segment_id: int = 0
    cut_at: int | None = None
    needs_checkpoint: bool = False


class HeldSegment(NamedTuple):
    """A segment as the index knows it, without its tokens.

    `token_nbytes` is what each of its tokens takes, 0 if it cannot be split.
    """

    id: int
    key: str
    parent_id: int
    start: int
    end: int
    nbytes: int
    token_nbytes: int
    created_at: float
    used_at: float
    model: str
    is_checkpoint: bool
    needs_checkpoint: bool


class HeldEnd(NamedTuple):
    """Where a listed prefix ends, and whether it has a name."""

    segment_id: int
    position: int
    pinned: bool


class Use(NamedTuple):
    """Up to where a segment was used at a time."""

    segment_id: int
    position: int
    used_at: float


class PromptRow(NamedTuple):
    """A listed prefix as the index knows it; `fingerprint` is a digest."""

    key: str
    fingerprint: str
    segment_id: int
    num_tokens: int
    origin: Origin | None


class StoredPrompt(NamedTuple):
    """A prompt whose end is listed, and how it came about.

    Attributes:
        key: The prefix's key.
        fingerprint: What it was computed under.
        token_ids: All of it.
        origin: How it was rendered, if that is known.
    """

    key: str
    fingerprint: Fingerprint
    token_ids: tuple[int, ...]
    origin: Origin | None


class Eviction(NamedTuple):
    """A segment that was taken away.

    Attributes:
        end: Where its range of tokens ended.
        reason: Why it went.
        removed_at: Unix time.
    """

    end: int
    reason: str
    removed_at: float


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """What the store has, and had, that is close to a prompt.

    Attributes:
        match: What a run would reuse.
        num_rows: Up to which token rows are stored, whether or not a run can take
            over there.
        nearest: The stored prompts that share the most tokens, the last used first.
        alike: Other prompts with the same system prompt or tools, under any
            fingerprint, the last used first.
        elsewhere: By how many tokens a prompt with the same ids would be matched under
            other fingerprints, the best first.
        eviction: The longest prefix of the prompt that was taken away, if any.
        num_prompts: How many prompts are listed under the same fingerprint.
    """

    match: Match
    num_rows: int
    nearest: tuple[StoredPrompt, ...]
    alike: tuple[StoredPrompt, ...]
    elsewhere: tuple[tuple[Fingerprint, int], ...]
    eviction: Eviction | None
    num_prompts: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one request got from the store.

    Attributes:
        fingerprint: What its KV values depend on.
        match: What the store has of it.
        cached_tokens: How many tokens of its prompt were reused, in memory perhaps.
        prefilled_tokens: How many tokens of its prompt were processed.
        load_seconds: Time to match the prompt and to load what is cached.
        prefill_seconds: From then to the first token.
    """

    fingerprint: Fingerprint
    match: Match
    cached_tokens: int
    prefilled_tokens: int
    load_seconds: float
    prefill_seconds: float


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """What it takes here to load cached tokens, and to read them again with the model.

    Attributes:
        load_seconds: From disk, as the last loads of this model's prefixes went.
        prefill_seconds: By the model, as its last prefills went.
    """

    load_seconds: float
    prefill_seconds: float

    # Less is not worth a decision, and not known that well.
    LEAST_GAIN_SECONDS: ClassVar[float] = 0.02

    @property
    def favours_prefill(self) -> bool:
        """Return whether to read the tokens again."""
        return self.load_seconds - self.prefill_seconds > self.LEAST_GAIN_SECONDS

    def __str__(self) -> str:
        return (
            f"loading them takes {self.load_seconds:.2f} s here, "
            f"reading them {self.prefill_seconds:.2f} s"
        )
