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
from promptcache.reports import (
    PinQuota,
    Prefix,
    PrefixReport,
    PrunePlan,
    PrunePolicy,
    PruneReport,
    Usage,
    VerifyReport,
)
from promptcache.types import Fingerprint, Match

if TYPE_CHECKING:
    from promptcache.conversation import Conversation
    from promptcache.explanation import Divergence, Explanation
    from promptcache.generation import GenerationResponse
    from promptcache.generator import CachedGenerator
    from promptcache.store import PrefixStore

__version__ = "0.1.0"

__all__ = [
    "CachedGenerator",
    "Conversation",
    "DamagedBlobError",
    "DamagedIndexError",
    "Divergence",
    "Explanation",
    "Fingerprint",
    "GenerationResponse",
    "KeyNotFoundError",
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
    "StoreError",
    "StoreFormatError",
    "StoreFullError",
    "UnsupportedCacheError",
    "Usage",
    "UsageError",
    "VerifyReport",
]

# Imported on first use: the generator imports mlx_lm, which takes a second.
_MODULE_BY_NAME = {
    "CachedGenerator": "promptcache.generator",
    "Conversation": "promptcache.conversation",
    "Divergence": "promptcache.explanation",
    "Explanation": "promptcache.explanation",
    "GenerationResponse": "promptcache.generation",
    "PrefixStore": "promptcache.store",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_BY_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_BY_NAME])
