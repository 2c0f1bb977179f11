"""The errors that promptcache raises, one class for each thing that can go wrong.

    PromptCacheError
    ├── UsageError
    │   ├── KeyNotFoundError
    │   └── QuotaError
    ├── ModelError
    │   └── UnsupportedCacheError
    └── StoreError
        ├── StoreFormatError
        ├── DamagedIndexError
        ├── StoreFullError
        └── DamagedBlobError

Messages are one sentence without a full stop that says what to do next. What a
generation survives is a warning, not an error.
"""

import warnings

from promptcache.printable import printable


class PromptCacheError(Exception):
    """Something that a user, a disk or a model caused, in one line."""

    exit_code = 1

    def __str__(self) -> str:
        # Python prints it as it is, and it may quote what others wrote.
        return printable(super().__str__())


class UsageError(PromptCacheError):
    """The request itself is not valid."""

    exit_code = 2


class KeyNotFoundError(UsageError):
    """No prefix, or more than one, has the given key or name."""

    exit_code = 1


class QuotaError(UsageError):
    """More would be pinned in a namespace than its quota allows."""

    exit_code = 1


class ModelError(PromptCacheError):
    """A model cannot be found, downloaded or loaded."""


class UnsupportedCacheError(ModelError):
    """A model keeps its state in a cache class that promptcache cannot store."""


class StoreError(PromptCacheError):
    """The store cannot be opened, read or written."""


class StoreFormatError(StoreError):
    """The store was written by a newer promptcache."""


class DamagedIndexError(StoreError):
    """The index is not a database any more; it can be rebuilt from the blobs."""


class StoreFullError(StoreError):
    """Nothing more may be evicted and the size limit would be exceeded."""


class DamagedBlobError(StoreError):
    """A blob is missing, truncated or does not hold what was written."""


class PromptCacheWarning(UserWarning):
    """The cache had trouble and generation went on without it."""


def warn(message: str) -> None:
    """Warn of trouble with the cache that a generation survives."""
    warnings.warn(printable(message), PromptCacheWarning, stacklevel=3)
