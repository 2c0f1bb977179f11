"""The values that runs get from a store, and report to it, all frozen."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match, PromptOrigin


class StoredPrompt(NamedTuple):
    """A prompt whose end is listed; `origin` is how it was rendered, if known."""

    key: str
    fingerprint: Fingerprint
    token_ids: tuple[int, ...]
    origin: PromptOrigin | None


class Eviction(NamedTuple):
    """A segment that was removed at a Unix time; `end` is that of its tokens."""

    end: int
    reason: str
    removed_at: float


@dataclass(frozen=True, slots=True)
class NearbyPrefixes:
    """What the store has, and had, that is close to a prompt.

    Attributes:
        match: What a run would reuse.
        num_rows: Up to which token rows are stored, whether or not a run can resume
            there.
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
class RequestUsage:
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
    MIN_GAIN_SECONDS: ClassVar[float] = 0.02

    @property
    def prefill_is_faster(self) -> bool:
        """Return whether to read the tokens again."""
        return self.load_seconds - self.prefill_seconds > self.MIN_GAIN_SECONDS

    def __str__(self) -> str:
        return (
            f"loading them takes {self.load_seconds:.2f} s here, "
            f"reading them {self.prefill_seconds:.2f} s"
        )
