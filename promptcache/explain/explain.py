"""Find out why a prompt hits or misses, from what the store has close to it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from promptcache.config import directories, hostnames
from promptcache.errors import UsageError
from promptcache.explain.fingerprint_diff import (
    FOLLOWING_PARTS,
    KV_DETAILS,
    change_of_config,
    change_of_part,
    change_of_tools,
    changed_parts,
    name_of_part,
    values_of_parts,
)
from promptcache.explain.text_diff import compare
from promptcache.explain.types import Divergence, Explanation
from promptcache.prompts.chat import message_texts
from promptcache.prompts.render import RenderedPrompt
from promptcache.prompts.template import render
from promptcache.segments.chain import common_length, pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import PromptOrigin
from promptcache.store import PrefixStore
from promptcache.store.nearby import is_alike, shares_tools
from promptcache.store.types import Eviction, NearbyPrefixes, StoredPrompt
from promptcache.units import format_age

# How much of both sides of a divergence is shown.
SHOWN_TOKENS = 24


def explain_prompt(
    store: PrefixStore,
    tokenizer: Any,
    rendered: RenderedPrompt,
    fingerprint: Fingerprint,
) -> Explanation:
    """Return why a prompt hits or misses in a store. Raises StoreError."""
    nearby = store.segments.nearby(rendered.token_ids, fingerprint, rendered.origin)
    estimate = store.usage_log.estimate(fingerprint, nearby.match.cached_tokens)
    declines = estimate is not None and estimate.prefill_is_faster
    diagnosis = _Diagnosis(tokenizer, rendered, fingerprint, nearby)
    return replace(diagnosis.explain(), declined=estimate if declines else None)


class _Diagnosis:
    """Looks for the cause of one miss, the surest evidence first."""

    def __init__(
        self,
        tokenizer: Any,
        rendered: RenderedPrompt,
        fingerprint: Fingerprint,
        nearby: NearbyPrefixes,
    ) -> None:
        self._tokenizer = tokenizer
        self._rendered = rendered
        self._token_ids = rendered.token_ids
        self._packed = pack(rendered.token_ids)
        self._fingerprint = fingerprint
        self._own_digests = {reusable.digest for reusable in fingerprint.reusable}
        self._nearby = nearby
        self._cached = nearby.match.cached_tokens
        self._agreed = max(nearby.num_rows, *map(self._shared, nearby.nearest), 0)
        # A prompt with the same beginning would have to agree up to here.
        self._begin = rendered.system_end or len(self._token_ids) // 2

    def explain(self) -> Explanation:
        divergence = None
        if self._cached < len(self._token_ids) - 1:
            divergence = next(self._divergences(), None)
        parts_early = divergence is not None and self._is_early(divergence)
        return Explanation(
            prompt_tokens=len(self._token_ids),
            cached_tokens=self._cached,
            key=self._key(),
            divergence=divergence,
            is_miss=divergence is not None and (parts_early or not self._cached),
        )

    def _key(self) -> str | None:
        """Return the key of a listed prefix that is reused, in full if there is one."""
        if not self._cached:
            return None
        nearest = sorted(self._nearby.nearest, key=lambda p: len(p.token_ids))
        return nearest[0].key if nearest else self._nearby.match.key

    def _divergences(self) -> Iterator[Divergence]:
        """Yield what may have made the prompt miss, the surest first."""
        nearby = self._nearby
        if nearby.eviction is not None and nearby.eviction.end > self._agreed:
            yield self._evicted(nearby.eviction)
        yield from self._elsewhere()
        yield from self._rendered_otherwise()
        if self._agreed >= len(self._token_ids) - 1:
            yield from self._not_resumable()
        others = [p for p in nearby.nearest if len(p.token_ids) > self._agreed]
        texts = [self._other_text(prompt) for prompt in others[:1] if self._agreed]
        if len(others) < len(nearby.nearest):
            # A different question after a whole stored prompt is not a miss.
            yield from filter(self._is_early, texts)
            yield from self._not_resumable()
            return
        yield from texts
        yield from self._not_resumable()
        yield self._nothing_cached()

    def _shared(self, prompt: StoredPrompt) -> int:
        return common_length(self._packed, pack(prompt.token_ids))

    def _is_early(self, divergence: Divergence) -> bool:
        """Return whether it lies before the last user's text."""
        end = len(self._token_ids)
        return divergence.position < max(self._rendered.boundaries, default=end)

    def _evicted(self, eviction: Eviction) -> Divergence:
        age = format_age(max(time.time() - eviction.removed_at, 0))
        return self._divergence(
            "evicted",
            f"what was cached up to token {eviction.end} was evicted {age} ago "
            f"({eviction.reason})",
        )

    # Another model

    def _elsewhere(self) -> Iterator[Divergence]:
        """Yield the fingerprint under which more of the prompt is cached."""
        for other, num_tokens in self._nearby.elsewhere:
            if num_tokens > self._agreed and num_tokens >= self._begin:
                yield self._other_fingerprint(other)

    def _other_fingerprint(self, other: Fingerprint) -> Divergence:
        own, its = self._fingerprint.parts, other.parts
        names = changed_parts(its, own)
        if "kv_bits" in names:
            # Group size and start mean nothing without bits.
            names = [name for name in names if name not in KV_DETAILS]
        for cause, effect in FOLLOWING_PARTS:
            names = [n for n in names if n != effect or cause not in names]
        has_other_name = other.model != self._fingerprint.model
        if has_other_name and {"weights", "config"} <= set(names):
            # Another model has other parts of every kind.
            return Divergence(
                self._agreed,
                expected=other.model,
                found=self._fingerprint.model,
                kind="model",
                culprit=f"another model: this is cached for {other.model}, not for "
                f"{self._fingerprint.model}",
            )
        changes = [
            change_of_part(name, its.get(name, ""), own.get(name, "")) for name in names
        ]
        return Divergence(
            self._agreed,
            expected=values_of_parts(names, its),
            found=values_of_parts(names, own),
            kind=name_of_part(names[0]) if names else "model",
            culprit=f"other {' and '.join(changes)}",
        )

    # Rendered in another way

    def _rendered_otherwise(self) -> Iterator[Divergence]:
        """Yield another template, argument or tool list that explains the miss."""
        origin = self._rendered.origin
        if origin is None:
            return
        alike = self._nearby.alike
        if self._agreed < self._begin and not any(map(self._is_twin, alike)):
            for prompt in sorted(alike, key=self._shared, reverse=True):
                yield from self._other_origin(origin, prompt, is_nearest=False)
        for prompt in self._nearby.nearest:
            yield from self._other_origin(origin, prompt, is_nearest=True)

    def _is_twin(self, prompt: StoredPrompt) -> bool:
        """Return whether a prompt was rendered in the same way for the same model."""
        same_model = prompt.fingerprint.digest in self._own_digests
        return same_model and prompt.origin == self._rendered.origin

    def _other_origin(
        self, origin: PromptOrigin, prompt: StoredPrompt, *, is_nearest: bool
    ) -> Iterator[Divergence]:
        """Yield in what a stored prompt's origin differs, if that is the cause."""
        other = prompt.origin
        if other is None:
            return
        if prompt.fingerprint.digest not in self._own_digests:
            yield self._other_fingerprint(prompt.fingerprint)
        elif other.template != origin.template:
            if self._says_the_same(prompt):
                yield self._divergence("template", "another chat template", prompt)
        elif other.config != origin.config and self._would_share_more(
            prompt, other.config
        ):
            culprit = f"another template argument: {change_of_config(other, origin)}"
            yield self._divergence("template argument", culprit, prompt)
        elif other.tools != origin.tools:
            # Beyond the system prompt, the tools have been read and are the same.
            in_head = not is_nearest or self._agreed < self._begin
            if in_head and (is_alike(origin, other) or self._has_other_text(prompt)):
                culprit = change_of_tools(other.tools, origin.tools)
                yield self._divergence("tools", culprit, prompt)

    def _has_other_text(self, prompt: StoredPrompt) -> bool:
        """Return whether no better cause is known than different tools."""
        origin, other = self._rendered.origin, prompt.origin
        if origin is None or other is None or not self._shared(prompt):
            return False
        return shares_tools(origin, other) and self._other_text(prompt).kind == "text"

    def _says_the_same(self, prompt: StoredPrompt) -> bool:
        """Return whether all that is said in this prompt is said in a stored one."""
        chat = self._rendered.chat
        text = self._decode(prompt.token_ids)
        said = [] if chat is None else message_texts(chat)
        return any(said) and all(part in text for part in said)

    def _would_share_more(
        self, prompt: StoredPrompt, config: Mapping[str, Any]
    ) -> bool:
        """Return whether it would with other arguments of the chat template."""
        chat = self._rendered.chat
        if chat is None:
            return False
        try:
            token_ids = render(
                self._tokenizer,
                chat.messages,
                tools=chat.tools,
                chat_template_config=config,
            )
        except UsageError:
            return False
        shared = common_length(pack(token_ids), pack(prompt.token_ids))
        return shared > self._shared(prompt)

    # Other text

    def _other_text(self, prompt: StoredPrompt) -> Divergence:
        at = self._shared(prompt)
        if self._is_same_text(prompt, at):
            kind = "tokenization"
            clause = "the same text was generated as other tokens than it is read as"
        else:
            kind, clause = compare(
                self._decode(prompt.token_ids),
                self._decode(self._token_ids),
                len(self._decode(self._token_ids[:at])),
                hostnames=hostnames(),
                directories=directories(),
            )
        return self._divergence(kind, f"{clause}{self._where(at)}", prompt)

    def _is_same_text(self, prompt: StoredPrompt, at: int) -> bool:
        """Return whether only the tokens differ, and the text goes on alike."""
        both = (prompt.token_ids[at : at + 8], self._token_ids[at : at + 8])
        if not all(both):
            return False
        stored, own = map(self._decode, both)
        length = max(len(self._decode(token_ids[:1])) for token_ids in both)
        return stored[:length] == own[:length]

    def _where(self, position: int) -> str:
        """Return in which part of the prompt a position is, if that is known."""
        boundaries = self._rendered.boundaries
        if not boundaries or self._rendered.chat is None:
            return ""
        if position >= boundaries[-1]:
            return " in the last message"
        if position < self._rendered.system_end:
            return " before the first message"
        return " in an earlier message"

    def _not_resumable(self) -> Iterator[Divergence]:
        """Yield that more is stored than a run can resume from."""
        num_rows = self._nearby.num_rows
        if num_rows > self._cached:
            divergence = self._divergence(
                "checkpoint",
                f"{num_rows} tokens are stored, but this model can resume at token "
                f"{self._cached} only",
            )
            yield replace(divergence, expected=divergence.found)

    def _nothing_cached(self) -> Divergence:
        model = self._fingerprint.model
        others = {other.model for other, _ in self._nearby.elsewhere} - {model}
        clause = f"nothing cached begins like this for {model}"
        if not self._nearby.num_prompts:
            clause = f"nothing cached for {model} yet"
        if others:
            clause += f", only for {', '.join(sorted(others))}"
        return self._divergence("nothing cached", clause)

    def _divergence(
        self, kind: str, culprit: str, prompt: StoredPrompt | None = None
    ) -> Divergence:
        """Return where this prompt parts from a stored one, or from all that are."""
        start = self._agreed if prompt is None else self._shared(prompt)
        shown = slice(start, start + SHOWN_TOKENS)
        expected = "" if prompt is None else self._decode(prompt.token_ids[shown])
        found = self._decode(self._token_ids[shown])
        return Divergence(start, expected, found, kind, culprit)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        )
