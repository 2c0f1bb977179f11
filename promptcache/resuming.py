"""Resuming: fill a fresh cache with what a match found in the store."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from promptcache import codec
from promptcache.chain import pack
from promptcache.errors import DamagedBlobError, StoreError
from promptcache.prefill import Cuts, KVSettings, quantize
from promptcache.saving import warn
from promptcache.store import PrefixStore
from promptcache.types import Match, SegmentSlice

# One step of mlx-lm's cache: an answer's first tokens need no new allocation.
DECODE_ROOM = 256


def resume(
    store: PrefixStore,
    match: Match,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    cuts: Cuts,
    kv: KVSettings,
) -> Match:
    """Load a match into a fresh cache; return the part of it that could be loaded.

    A blob that is missing or damaged ends the match before it, with one warning;
    the store forgets it. The cache then holds the returned match, quantized if a run
    from nothing would have it so by now, and has room for all of `token_ids` and the
    first steps of decoding.
    """
    quantized_from = cuts.quantized_from(kv)
    segments: list[codec.LoadedSegment] = []
    for part in match.slices:
        try:
            path, header = store.open_blob(part)
            # A run from nothing still reads these rows as they were computed.
            if codec.is_quantized(header.layout) and part.start < (quantized_from or 0):
                break
            ids = pack(token_ids[part.start : part.stop])
            segments.append(codec.load(path, header, part, ids))
        except StoreError as error:
            _give_up(store, part, error)
            break
    loaded = replace(match, slices=match.slices[: len(segments)])
    if not segments:
        return Match()
    try:
        cache[:] = codec.restore(cache, segments, len(token_ids) + DECODE_ROOM)
    except StoreError as error:
        _give_up(store, loaded.slices[0], error)
        return Match()
    if quantized_from is not None and loaded.cached_tokens >= quantized_from:
        quantize(cache, loaded.cached_tokens, kv)
    return loaded


def checked(store: PrefixStore, match: Match) -> Match:
    """Return the part of a match whose blobs are there, forgetting the rest."""
    for i, part in enumerate(match.slices):
        try:
            store.open_blob(part)
        except StoreError as error:
            _give_up(store, part, error)
            return replace(match, slices=match.slices[:i])
    return match


def _give_up(store: PrefixStore, part: SegmentSlice, error: StoreError) -> None:
    names: list[str] = []
    if isinstance(error, DamagedBlobError):
        with contextlib.suppress(StoreError):
            names = store.give_up(part.key)
    lost = f", and {', '.join(names)} is no longer pinned" if names else ""
    warn(
        f"cached segment {part.key[:12]} cannot be used and is read again: "
        f"{error}{lost}"
    )
