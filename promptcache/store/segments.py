"""The segments of a store, as runs read and save them.

What was found by `PrefixStore.lookup` is opened here, and what is missing of a prefix
is saved here. A run never sees rows or names of prefixes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.segments.blob_format import BlobHeader
from promptcache.segments.chain import Chain
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match, PromptOrigin, SegmentSlice
from promptcache.store.folder import LockedError, StoreFolder
from promptcache.store.maintenance import verify
from promptcache.store.maintenance.disk_budget import DiskBudget
from promptcache.store.nearby import find_neighbourhood, joined
from promptcache.store.types import NearbyPrefixes
from promptcache.store.writer import SegmentWriter

# Long prompts are read for minutes. Whoever has waited for that long computes the
# prefix as well, which harms nothing.
BUILD_SECONDS = 1800.0


class Segments(SegmentWriter):
    """The segments of a store: read, saved and given up by runs."""

    def __init__(self, folder: StoreFolder, budget: DiskBudget) -> None:
        super().__init__(folder._index, folder._blobs, budget)
        self._folder = folder

    def key_of(self, token_ids: Sequence[int], fingerprint: Fingerprint) -> str:
        """Return the key that a prefix has, or would have."""
        return Chain(fingerprint.digest, token_ids).key_at(len(token_ids))

    def open_blob(self, part: SegmentSlice) -> tuple[Path, BlobHeader]:
        """Return the path and the verified header of a matched segment's blob.

        Raises:
            DamagedBlobError: It is missing or does not hold this segment.
            StoreFormatError: A newer promptcache wrote it.
        """
        header = self._blobs.read_header(part.key)
        if (header.info.start, header.info.end) != (part.start, part.end):
            raise DamagedBlobError("blob holds another range of tokens")
        return self._blobs.path(part.key), header

    def holds(self, part: SegmentSlice) -> bool:
        """Return whether a matched segment is there as it was. Raises StoreError."""
        return self._index.has_segment(part.key, part.start, part.end)

    def nbytes_of(self, match: Match) -> int:
        """Return the size of the blobs of a match. Raises StoreError."""
        return self._index.nbytes_of([part.key for part in match.slices])

    def nearby(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        origin: PromptOrigin | None = None,
    ) -> NearbyPrefixes:
        """Return what is stored, and was, that is close to a prompt.

        Only what is in the fingerprint's namespace counts.

        Args:
            token_ids: The prompt.
            fingerprint: What its KV values depend on.
            origin: How it was rendered.

        Raises:
            StoreError: The index cannot be read.
        """
        chains = [Chain(f.digest, token_ids) for f in fingerprint.reusable]
        with self._index.database.reading():
            return joined(
                [
                    find_neighbourhood(
                        self._index, chain, origin, namespace=fingerprint.namespace
                    )
                    for chain in chains
                ],
                fingerprint,
            )

    def set_origin(self, key: str, origin: PromptOrigin) -> None:
        """Note how a listed prefix was rendered. Raises StoreError."""
        self._index.prefixes.set_origin(key, origin)
        self._budget.try_reserve(0)

    @contextlib.contextmanager
    def building(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock for computing a prefix, so that only one process does.

        `on_wait` is called when another process holds it. The lock of a process
        that dies is released, and one that is stopped is not waited for for long: the
        prefix is then computed here, too. Raises StoreError.
        """
        if self._folder.is_read_only:
            raise StoreError(f"the store {self._folder.path} is read-only")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._folder.locked(key, most=0.0))
            except LockedError:
                on_wait()
                self._wait_for_build(stack, key)
            yield

    def _wait_for_build(self, stack: contextlib.ExitStack, key: str) -> None:
        waiting = self._folder.locked(key, most=BUILD_SECONDS, tell_after=0.0)
        try:
            stack.enter_context(waiting)
        except LockedError as error:
            self._folder.patience.on_wait(f"waiting no longer: {error}")

    def give_up(self, key: str) -> list[str]:
        """Forget a segment that cannot be used, with its descendants.

        Its blob moves to `quarantine/`. Return the names that went. Raises StoreError.
        """
        return verify.quarantine_segment(self._index, self._blobs, key)
