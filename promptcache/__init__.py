"""promptcache remembers what a language model has already read.

It keeps the KV caches of prompt prefixes on disk, content-addressed, and resumes
any later generation from the longest prefix it has.
"""

from typing import TYPE_CHECKING, Any

from promptcache.errors import (
    DamagedBlobError,
    DamagedIndexError,
    KeyNotFoundError,
    ModelError,
    PromptCacheError,
    PromptCacheWarning,
    QuotaError,
    StoreError,
    StoreFormatError,
    StoreFullError,
    UnsupportedCacheError,
    UsageError,
)
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match

if TYPE_CHECKING:
    from promptcache.aio import AsyncCachedGenerator
    from promptcache.chat.conversation import Conversation
    from promptcache.engine.batch.engine import Engine
    from promptcache.engine.batch.results import BatchResponse, BatchResult
    from promptcache.engine.build import BuiltPrefix
    from promptcache.engine.response import GenerationResponse
    from promptcache.explain.lint import VolatileText
    from promptcache.explain.types import Divergence, Explanation
    from promptcache.generator import CachedGenerator
    from promptcache.prompts.render import RenderedPrompt
    from promptcache.segments.fingerprint import Fingerprint
    from promptcache.segments.types import Match
    from promptcache.store.reports import (
        Damage,
        Garbage,
        PinQuota,
        Prefix,
        PrefixReport,
        PrunePlan,
        PrunePolicy,
        PruneReport,
        Removal,
        SegmentReport,
        Usage,
        VerifyReport,
    )
    from promptcache.store.store import PrefixStore
    from promptcache.store.types import LoadEstimate

__version__ = "0.1.0"

# Imported on first use: the generator imports mlx_lm, which takes a second.
_NAMES_BY_MODULE = {
    "aio": ["AsyncCachedGenerator"],
    "chat.conversation": ["Conversation"],
    "engine.batch.engine": ["Engine"],
    "engine.batch.results": ["BatchResponse", "BatchResult"],
    "engine.response": ["GenerationResponse"],
    "explain.lint": ["VolatileText"],
    "explain.types": ["Divergence", "Explanation"],
    "engine.build": ["BuiltPrefix"],
    "generator": ["CachedGenerator"],
    "prompts.render": ["RenderedPrompt"],
    "segments.fingerprint": ["Fingerprint"],
    "segments.types": ["Match"],
    "store.reports": [
        *["Damage", "Garbage", "PinQuota", "Prefix", "PrefixReport", "PrunePlan"],
        *["PrunePolicy", "PruneReport", "Removal", "SegmentReport", "Usage"],
        "VerifyReport",
    ],
    "store.store": ["PrefixStore"],
    "store.types": ["LoadEstimate"],
}
_MODULE_BY_NAME = {
    name: f"promptcache.{module}"
    for module, names in _NAMES_BY_MODULE.items()
    for name in names
}

__all__ = [
    "AsyncCachedGenerator",
    "BatchResponse",
    "BatchResult",
    "BuiltPrefix",
    "CachedGenerator",
    "Conversation",
    "Damage",
    "DamagedBlobError",
    "DamagedIndexError",
    "Divergence",
    "Engine",
    "Explanation",
    "Fingerprint",
    "Garbage",
    "GenerationResponse",
    "KeyNotFoundError",
    "LoadEstimate",
    "Match",
    "ModelError",
    "PinQuota",
    "Prefix",
    "PrefixReport",
    "PrefixStore",
    "PromptCacheError",
    "PromptCacheWarning",
    "PrunePlan",
    "PrunePolicy",
    "PruneReport",
    "QuotaError",
    "Removal",
    "RenderedPrompt",
    "SegmentReport",
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "UnsupportedCacheError",
    "Usage",
    "UsageError",
    "VerifyReport",
    "VolatileText",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_BY_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_BY_NAME])
