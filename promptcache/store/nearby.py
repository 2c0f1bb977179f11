"""Neighbourhoods: what the store has, and had, that is close to a prompt.

It answers why a prompt misses; a run needs nothing of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from promptcache.segments.chain import TOKEN_NBYTES, Chain, common_length, pack, unpack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import CHECKPOINT_TAG, PromptOrigin
from promptcache.store.index import Index
from promptcache.store.index.rows import PromptRow
from promptcache.store.lookup import longest_match, longest_stored
from promptcache.store.types import Eviction, NearbyPrefixes, StoredPrompt

# Of so many prompts, the last used ones, the tokens are compared.
MAX_PROMPTS = 100
TAGS = ("", CHECKPOINT_TAG)


class _Finder:
    """Looks around one prompt in its namespace, in one state of the index."""

    def __init__(self, index: Index, chain: Chain, namespace: str) -> None:
        self._index = index
        self._chain = chain
        # What others have is not looked at: whoever asks could read it out of the
        # answers, token by token, or out of the time that they take.
        fingerprints = index.fingerprints.of_namespace(namespace)
        self._fingerprints = {f.digest: f for f in fingerprints}
        self._listed = index.prefixes.prompts(namespace)

    def find(self, origin: PromptOrigin | None) -> NearbyPrefixes:
        index, chain = self._index, self._chain
        rows = longest_stored(index, chain, limit=len(chain))
        # A run leaves at least the last token to read.
        rest_left = Chain(chain.fingerprint, chain.data[:-TOKEN_NBYTES])
        return NearbyPrefixes(
            match=longest_match(index, rest_left),
            num_rows=rows.cached_tokens,
            nearest=self._nearest(rows.key),
            alike=() if origin is None else self._alike(origin),
            elsewhere=tuple(self._elsewhere()),
            eviction=self._eviction(),
            num_prompts=len(self._own()),
        )

    def _own(self) -> list[PromptRow]:
        return [
            row for row in self._listed if row.fingerprint == self._chain.fingerprint
        ]

    def _nearest(self, key: str | None) -> tuple[StoredPrompt, ...]:
        """Return the prompts that share the most tokens with this one.

        `key` is that of the last segment that has some of its rows.
        """
        rows = self._own()
        if key is not None:
            below = self._index.subtree(key)
            # An interrupted build leaves rows that no prompt is listed with.
            rows = [row for row in rows if row.segment_id in below]
        prompts = list(self._with_tokens(rows))
        shared = [
            common_length(self._chain.data, pack(prompt.token_ids))
            for prompt in prompts
        ]
        most = max(shared, default=0)
        return tuple(
            p for p, length in zip(prompts, shared, strict=True) if length == most
        )

    def _alike(self, origin: PromptOrigin) -> tuple[StoredPrompt, ...]:
        rows = (r for r in self._listed if r.origin and is_alike(origin, r.origin))
        return tuple(self._with_tokens(rows))

    def _with_tokens(self, rows: Iterable[PromptRow]) -> Iterator[StoredPrompt]:
        for row in islice(rows, MAX_PROMPTS):
            token_ids = self._index.token_ids(row.segment_id, row.num_tokens)
            fingerprint = self._fingerprints[row.fingerprint]
            yield StoredPrompt(row.key, fingerprint, unpack(token_ids), row.origin)

    def _elsewhere(self) -> list[tuple[Fingerprint, int]]:
        prompts = []
        for fingerprint in self._fingerprints.values():
            if fingerprint.digest != self._chain.fingerprint:
                other = Chain(fingerprint.digest, self._chain.data)
                rows = longest_stored(self._index, other, limit=len(other))
                prompts.append((fingerprint, rows.cached_tokens))
        return sorted((f for f in prompts if f[1]), key=lambda f: -f[1])

    def _eviction(self) -> Eviction | None:
        """Return the longest prefix of the prompt that was taken away."""
        chain = self._chain
        for key, eviction in self._index.history.evictions(chain.fingerprint):
            if eviction.end <= len(chain) and key in {
                chain.tagged_key_at(eviction.end, tag) for tag in TAGS
            }:
                return eviction
        return None


def find_neighbourhood(
    index: Index, chain: Chain, origin: PromptOrigin | None, *, namespace: str
) -> NearbyPrefixes:
    """Return what a namespace has close to a prompt. Raises StoreError."""
    return _Finder(index, chain, namespace).find(origin)


def joined(found: Sequence[NearbyPrefixes], fingerprint: Fingerprint) -> NearbyPrefixes:
    """Return one neighbourhood from those of all fingerprints whose rows are reused.

    Of those with equal matches, the first counts.
    """
    if len(found) == 1:
        return found[0]
    own = {reusable.digest for reusable in fingerprint.reusable}
    best = max(found, key=lambda around: (around.match.cached_tokens, around.num_rows))
    evictions = [around.eviction for around in found if around.eviction is not None]
    return replace(
        best,
        elsewhere=tuple(e for e in best.elsewhere if e[0].digest not in own),
        eviction=max(evictions, key=lambda eviction: eviction.end, default=None),
        num_prompts=sum(around.num_prompts for around in found),
    )


def is_alike(left: PromptOrigin, right: PromptOrigin) -> bool:
    """Return whether two prompts are meant to begin alike."""
    if left.system or right.system:
        return left.system == right.system
    return shares_tools(left, right)


def shares_tools(left: PromptOrigin, right: PromptOrigin) -> bool:
    """Return whether two prompts have a tool of the same name."""
    return bool({name for name, _ in left.tools} & {name for name, _ in right.tools})
