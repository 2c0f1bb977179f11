"""Explanations: what of a prompt is cached, and why not more, in words."""

from dataclasses import asdict, dataclass
from typing import Any

from promptcache.store.types import LoadEstimate


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where and why a prompt parts from what is, or was, cached.

    Attributes:
        position: How many tokens agree.
        expected: What the cached prompt goes on with, as text, or the value of what
            differs otherwise; empty where nothing is cached any more.
        found: The same of this prompt.
        kind: What kind of change it is, such as "date" or "template".
        culprit: The likeliest cause, in one clause that begins with what changed.
    """

    position: int
    expected: str
    found: str
    kind: str
    culprit: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a run would reuse of a prompt, and why not more.

    Attributes:
        prompt_tokens: Length of the prompt.
        cached_tokens: How many tokens a run would reuse.
        key: Of a stored prefix that it is reused from, or None.
        divergence: Where something else is cached, or None where all that is cached
            of it is reused.
        is_miss: Whether more could have been expected: nothing is reused, or the
            prompt parts from the cached one before the last user's text.
        declined: Why a run would read cached tokens again all the same, if it would.
        verdict: All of this in one sentence.
    """

    prompt_tokens: int
    cached_tokens: int
    key: str | None
    divergence: Divergence | None
    is_miss: bool
    declined: LoadEstimate | None = None

    @property
    def is_full(self) -> bool:
        """Return whether nothing but the last token, if that, would be read."""
        return self.cached_tokens >= self.prompt_tokens - 1

    @property
    def verdict(self) -> str:
        """Return what happens, in one sentence."""
        if self.declined is None:
            return self._hit_or_miss
        return f"{self._hit_or_miss}; they are prefilled all the same: {self.declined}"

    @property
    def _hit_or_miss(self) -> str:
        counts = f"{self.cached_tokens} of {self.prompt_tokens} tokens are cached"
        if self.is_full:
            return f"a full hit: {counts}"
        if self.divergence is None:
            return f"a partial hit: {counts}, the rest is new"
        kind = "a partial hit" if self.cached_tokens else "a miss"
        at, culprit = self.divergence.position, self.divergence.culprit
        if at < self.cached_tokens:
            # What it was expected to go on from shares less than something else does.
            return f"{kind}: {counts}; {culprit}"
        return f"{kind}: {counts}; from token {at} on, {culprit}"

    def to_json(self) -> dict[str, Any]:
        """Return it as commands print it, and servers answer it."""
        return {**asdict(self), "verdict": self.verdict}
