"""The store: prefixes on disk, found by token ids.

It owns one folder: the index, the blobs and what keeps both small and sound. It never
sees a tensor: what saves hands it a function that encodes a range of tokens, what
loads gets the path and the header of a blob. Words: *prefix*, *pin*, *evict*, *prune*.
"""

from promptcache.store.store import PrefixStore
from promptcache.store.writer import MAX_SEGMENT_TOKENS, Encode

__all__ = ["MAX_SEGMENT_TOKENS", "Encode", "PrefixStore"]
