"""Where things are kept on this machine, and the only reader of the environment."""

import os
from pathlib import Path

import platformdirs

from promptcache.errors import StoreError, UsageError
from promptcache.units import parse_size

DEFAULT_MAX_NBYTES = 10 * 10**9


def cache_dir() -> Path:
    """Return the user's cache folder for promptcache, which may not exist yet."""
    return absolute(platformdirs.user_cache_dir("promptcache", appauthor=False))


def absolute(path: str | Path) -> Path:
    """Return a path that stays valid when the process changes its directory.

    Raises:
        StoreError: The current directory is gone, or the home folder is unknown.
    """
    try:
        return Path(path).expanduser().absolute()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(f"{path} cannot be found ({reason})") from error


def store_dir(path: str | Path | None = None) -> Path:
    """Return a store's folder: `path`, else `PROMPTCACHE_DIR`, else the user's own.

    It is absolute. Raises StoreError if it cannot be.
    """
    if path := path or os.environ.get("PROMPTCACHE_DIR"):
        return absolute(path)
    return default_store_dir()


def default_store_dir() -> Path:
    """Return the folder of the store that is used where none is named."""
    return cache_dir() / "store"


def models_dir() -> Path:
    """Return the folder of models that promptcache converted itself."""
    return cache_dir() / "models"


def known_models_path() -> Path:
    """Return the file that remembers the hashes of weights loaded before."""
    return cache_dir() / "known-models.json"


def max_nbytes() -> int:
    """Return the size limit in bytes: `PROMPTCACHE_MAX_SIZE`, else 10 GB.

    Raises:
        UsageError: `PROMPTCACHE_MAX_SIZE` is not a size.
    """
    size = _size_of("PROMPTCACHE_MAX_SIZE")
    return DEFAULT_MAX_NBYTES if size is None else size


def min_free_nbytes() -> int | None:
    """Return how many bytes of the disk to leave free: `PROMPTCACHE_MIN_FREE`.

    None if it is not set. Raises UsageError if it is not a size.
    """
    return _size_of("PROMPTCACHE_MIN_FREE")


def max_daily_nbytes() -> int | None:
    """Return how many bytes to write in a day: `PROMPTCACHE_DAILY_WRITES`.

    None if it is not set. Raises UsageError if it is not a size.
    """
    return _size_of("PROMPTCACHE_DAILY_WRITES")


def memory_limit() -> int | None:
    """Return how many bytes of memory caches may take: `PROMPTCACHE_MEMORY_LIMIT`.

    None if it is not set. Raises UsageError if it is not a size.
    """
    return _size_of("PROMPTCACHE_MEMORY_LIMIT")


def _size_of(variable: str) -> int | None:
    size = os.environ.get(variable)
    try:
        return parse_size(size) if size else None
    except UsageError as error:
        raise UsageError(f"{variable}: {error}") from error


def api_keys() -> tuple[str, ...]:
    """Return the keys in `PROMPTCACHE_API_KEY`, which commas separate."""
    keys = os.environ.get("PROMPTCACHE_API_KEY", "").split(",")
    return tuple(key.strip() for key in keys if key.strip())


def metrics_key() -> str | None:
    """Return the key in `PROMPTCACHE_METRICS_KEY`, or None."""
    return os.environ.get("PROMPTCACHE_METRICS_KEY", "").strip() or None


def model_name() -> str | None:
    """Return the model named by `PROMPTCACHE_MODEL`, or None."""
    return os.environ.get("PROMPTCACHE_MODEL") or None


def hostnames() -> tuple[str, ...]:
    """Return the names of this machine, which lint looks for."""
    # Imported here because it takes 3 ms, which most commands do not need.
    import socket

    name = socket.gethostname()
    return (name, name.split(".")[0]) if "." in name else (name,)


def directories() -> tuple[str, ...]:
    """Return the working directory and the user's home, as `hostnames` does."""
    try:
        return str(Path.cwd()), str(Path.home())
    except (OSError, RuntimeError):
        # The directory is gone, or the home folder is unknown.
        return ()
