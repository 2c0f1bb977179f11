"""Chain hashes: the name of a prefix, computed from its token ids alone.

The hash at a block boundary is `xxh3_128(parent hash ‖ the block's ids as
little-endian uint32)`, as in vLLM's automatic prefix caching; the first parent
is the fingerprint's digest. A hash finds a prefix, its token ids confirm it.
"""

import sys
from array import array
from collections.abc import Sequence
from functools import cached_property

import xxhash

from promptcache.errors import UsageError

BLOCK_SIZE = 32
TOKEN_NBYTES = 4


def pack(token_ids: Sequence[int]) -> bytes:
    """Return token ids as little-endian uint32. Raises UsageError for others."""
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise UsageError("token ids are integers in [0, 2**32)") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(data: bytes) -> tuple[int, ...]:
    """Return the token ids of little-endian uint32 bytes."""
    packed = array("I", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)


def common_length(left: bytes, right: bytes) -> int:
    """Return the number of leading token ids that two packed sequences share."""
    low, high = 0, min(len(left), len(right)) // TOKEN_NBYTES
    while low < high:
        middle = (low + high + 1) // 2
        span = slice(low * TOKEN_NBYTES, middle * TOKEN_NBYTES)
        if left[span] == right[span]:
            low = middle
        else:
            high = middle - 1
    return low


class Chain:
    """The chain hashes of one sequence of token ids under one fingerprint's digest."""

    def __init__(self, fingerprint: str, token_ids: Sequence[int] | bytes) -> None:
        self.fingerprint = fingerprint
        self.data = token_ids if isinstance(token_ids, bytes) else pack(token_ids)

    def __len__(self) -> int:
        return len(self.data) // TOKEN_NBYTES

    def span(self, start: int, end: int) -> bytes:
        """Return the packed token ids `[start, end)`."""
        return self.data[start * TOKEN_NBYTES : end * TOKEN_NBYTES]

    def token_id(self, position: int) -> int:
        return int.from_bytes(self.span(position, position + 1), "little")

    @cached_property
    def _digests(self) -> list[bytes]:
        """The chain hash at each block boundary, the root's first."""
        digests = [bytes.fromhex(self.fingerprint)]
        for start in range(0, len(self) - BLOCK_SIZE + 1, BLOCK_SIZE):
            block = self.span(start, start + BLOCK_SIZE)
            digests.append(xxhash.xxh3_128_digest(digests[-1] + block))
        return digests

    def block_hash(self, num_blocks: int) -> int:
        """Return the first 64 bits of the chain hash after a number of blocks."""
        return int.from_bytes(self._digests[num_blocks][:8], "little", signed=True)

    def block_hashes(self, start: int, end: int) -> list[int]:
        """Return the hashes at the block boundaries in `(start, end]`."""
        first, last = start // BLOCK_SIZE + 1, end // BLOCK_SIZE
        return [self.block_hash(i) for i in range(first, last + 1)]

    def key_at(self, position: int) -> str:
        """Return the chain hash of the prefix `[0, position)`, in hex."""
        num_blocks, rest = divmod(position, BLOCK_SIZE)
        digest = self._digests[num_blocks]
        if rest:
            tail = self.span(position - rest, position)
            digest = xxhash.xxh3_128_digest(digest + tail)
        return digest.hex()

    def tagged_key_at(self, position: int, tag: str) -> str:
        """Return a key that differs from those of other segments with the same end."""
        digest = bytes.fromhex(self.key_at(position))
        return xxhash.xxh3_128_hexdigest(digest + tag.encode()) if tag else digest.hex()
