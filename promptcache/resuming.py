"""Resuming: fill a fresh cache with what a match found in the store."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from promptcache import codec
from promptcache.chain import pack
from promptcache.errors import DamagedBlobError, StoreError
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
) -> Match:
    """Load a match into a fresh cache; return the part of it that could be loaded.

    A blob that is missing or damaged ends the match before it, with one warning;
    the store forgets it. The cache then holds the returned match, and has room for
    all of `token_ids` and the first steps of decoding.
    """
    segments: list[codec.LoadedSegment] = []
    for part in match.slices:
        try:
            segments.append(_load(store, part, token_ids))
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
    return loaded


def _load(
    store: PrefixStore, part: SegmentSlice, token_ids: Sequence[int]
) -> codec.LoadedSegment:
    path, header = store.open_blob(part)
    return codec.load(path, header, part, pack(token_ids[part.start : part.stop]))


def _give_up(store: PrefixStore, part: SegmentSlice, error: StoreError) -> None:
    warn(f"cached segment {part.key[:12]} cannot be used and is read again: {error}")
    if isinstance(error, DamagedBlobError):
        with contextlib.suppress(StoreError):
            store.give_up(part.key)
