"""Rebuilding: an index that is missing or damaged is made again from the blobs.

A blob names its parent by a place: the position where it starts, with the chain hash
there. So it stays as it is when its parent is split; which segment has that place now
is determined here.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from promptcache.errors import DamagedIndexError, StoreError
from promptcache.files import locked_folder
from promptcache.segments.blob_format import BlobHeader
from promptcache.segments.chain import Chain
from promptcache.segments.cut import token_nbytes
from promptcache.segments.types import ResumeRules, SegmentInfo
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import ROOT_ID, Database, Index
from promptcache.store.index.connection import BESIDE
from promptcache.store.index.rows import PrefixRow
from promptcache.store.maintenance.prefix_backup import read_prefixes

Place = tuple[int, str]


def create_index(database: Database, blobs: BlobFolder) -> None:
    """Create the file of an index if it is missing. Raises StoreError.

    The files beside it belong to an earlier index, which a process may still use.
    """
    with _locked(blobs, "the index cannot be created"):
        if database.is_missing():
            _quarantine(database, blobs, BESIDE)
            database.create()


def quarantine_index(database: Database, blobs: BlobFolder) -> None:
    """Move a damaged index into `quarantine/`. Raises StoreError.

    Processes that have it open finish their writes first, and SQLite does not remove
    the files of an index that has lost its name.
    """
    with _locked(blobs, "the damaged index cannot be set aside"), database.frozen():
        _quarantine(database, blobs, ["", *BESIDE])


@contextlib.contextmanager
def _locked(blobs: BlobFolder, trouble: str) -> Iterator[None]:
    try:
        with locked_folder(blobs.root, blobs.files.patience):
            yield
    except OSError as error:
        raise StoreError(f"{trouble} ({error.strerror})") from error


def _quarantine(database: Database, blobs: BlobFolder, suffixes: Iterable[str]) -> None:
    for suffix in suffixes:
        blobs.files.quarantine_file(Path(f"{database.path}{suffix}"))


class _Holder(NamedTuple):
    """A segment that has a place."""

    key: str
    needs_checkpoint: bool


class _Cover:
    """Some places, and the segments that have them."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._holders: dict[Place, list[_Holder]] = {place: [] for place in places}
        self._positions = sorted({position for position, _ in self._holders})

    def add(
        self, chain: Chain, key: str, start: int, end: int, rules: ResumeRules
    ) -> None:
        """Add a segment's places: `(start, end]`, or only `end` if it cannot be cut."""
        after = start if rules.sliceable else max(start, end - 1)
        first = bisect_right(self._positions, after)
        last = bisect_right(self._positions, end)
        holder = _Holder(key, rules.needs_checkpoint)
        for position in self._positions[first:last]:
            place = position, chain.key_at(position)
            if place in self._holders:
                self._holders[place].append(holder)

    def parent_of(self, info: SegmentInfo) -> str | None:
        """Return the key of the segment that another one starts in, or None."""
        holders = self._holders.get((info.start, info.start_hash), [])
        return holders[0].key if holders else None

    def ends(self, num_tokens: int, key: str) -> list[str]:
        """Return the keys of the segments that a prefix may end in, by its own key."""
        holders = self._holders.get((num_tokens, key), [])
        return [holder.key for holder in holders if not holder.needs_checkpoint]


def rebuild(index: Index, blobs: BlobFolder, *, skip: Collection[str] = ()) -> int:
    """Add the blobs that the index lacks; return how many it added."""
    with index.database.writing():
        indexed = index.segment_keys()
        keys = [k for k, _ in blobs.stored() if k not in indexed and k not in skip]
        headers = _headers(blobs, keys)
        if not headers:
            return 0
        prefixes = read_prefixes(blobs)
        starts = ((header.info.start, header.info.start_hash) for header in headers)
        ends = ((prefix.num_tokens, prefix.key) for prefix in prefixes)
        cover = _Cover([*starts, *ends])
        for key in indexed:
            # A damaged row has nothing that can be relied on.
            with contextlib.suppress(DamagedIndexError):
                _cover_row(index, cover, key)
        added = sum(_reindex(index, blobs, cover, header) for header in headers)
        if added:
            _restore_prefixes(index, cover, prefixes)
    return added


def _headers(blobs: BlobFolder, keys: Iterable[str]) -> list[BlobHeader]:
    """Return the headers that can be read, parents first, and segments before heads."""
    headers = []
    for key in keys:
        with contextlib.suppress(StoreError):
            headers.append(blobs.read_header(key))
    return sorted(headers, key=lambda header: (header.info.start, -header.info.end))


def _cover_row(index: Index, cover: _Cover, key: str) -> None:
    segment_id = index.segment_id(key)
    if segment_id is None:
        return
    *_, row = index.path_to(segment_id)
    digest = index.fingerprints.of_segment(segment_id).digest
    chain = Chain(digest, index.token_ids(segment_id, row.end))
    rules = ResumeRules(row.sliceable, row.needs_checkpoint)
    cover.add(chain, key, row.start, row.end, rules)


def _reindex(
    index: Index, blobs: BlobFolder, cover: _Cover, header: BlobHeader
) -> bool:
    """Add the row of a blob whose ancestors are there and whose key is right."""
    info = header.info
    parent_key = cover.parent_of(info)
    parent_id = index.segment_id(parent_key) if parent_key else ROOT_ID
    if parent_id is None or (parent_id == ROOT_ID) != (info.start == 0):
        return False
    before = index.token_ids(parent_id, info.start) if parent_id else b""
    try:
        token_ids = blobs.read_token_ids(header)
    except OSError:
        # It went away meanwhile.
        return False
    chain = Chain(info.fingerprint.digest, before + token_ids)
    if not _has_keys(chain, info) or _is_double(index, parent_id, info, chain):
        return False
    index.add_segment(
        info,
        chain,
        parent_key=parent_key,
        nbytes=blobs.nbytes(info.key),
        token_nbytes=token_nbytes(info, header.tensors),
        created_at=info.created_at,
    )
    cover.add(chain, info.key, info.start, info.end, info.resumption)
    return True


def _has_keys(chain: Chain, info: SegmentInfo) -> bool:
    return (
        len(chain) == info.end
        and chain.tagged_key_at(info.end, info.tag) == info.key
        and chain.key_at(info.start) == info.start_hash
    )


def _is_double(index: Index, parent_id: int, info: SegmentInfo, chain: Chain) -> bool:
    """Return whether another segment, which a split made, has the same tokens.

    A process that is killed during a split leaves the segment and its head.
    """
    if info.is_checkpoint or not info.resumption.sliceable:
        return False
    first_tokens = {info.start: chain.token_id(info.start)}
    children = index.children(parent_id, chain.fingerprint, first_tokens)
    return any(child.sliceable for child in children)


def _restore_prefixes(
    index: Index, cover: _Cover, prefixes: Collection[PrefixRow]
) -> None:
    """List and name prefixes again, also those that end inside a segment."""
    listed = set(index.prefixes.listed())
    for prefix in prefixes:
        # A split may have come between the file and the rows.
        keys = (str(prefix.segment_key), *cover.ends(prefix.num_tokens, prefix.key))
        ids = (index.segment_id(key) for key in keys)
        segment_id = next((i for i in ids if i and has_key(index, i, prefix)), None)
        if prefix in listed or segment_id is None:
            continue
        now = index.clock.now()
        index.prefixes.add(prefix.key, segment_id, prefix.num_tokens, now=now)
        namespace = index.fingerprints.of_segment(segment_id).namespace
        names = {pin.name for pin in index.prefixes.pins(namespace)}
        if prefix.name is not None and prefix.name not in names:
            index.prefixes.set_name(prefix.key, prefix.name, manifest=prefix.manifest)


def has_key(index: Index, segment_id: int, prefix: PrefixRow) -> bool:
    """Return whether a prefix that ends in a segment has the key of its tokens."""
    *_, row = index.path_to(segment_id)
    if row.start > prefix.num_tokens:
        return False
    digest = index.fingerprints.of_segment(segment_id).digest
    chain = Chain(digest, index.token_ids(segment_id, prefix.num_tokens))
    is_long_enough = len(chain) == prefix.num_tokens
    return is_long_enough and chain.key_at(prefix.num_tokens) == prefix.key
