"""Prefixes on disk, found by token ids."""

from promptcache.store.segment_writer import MAX_SEGMENT_TOKENS, Encode
from promptcache.store.store import PrefixStore

__all__ = ["MAX_SEGMENT_TOKENS", "Encode", "PrefixStore"]
