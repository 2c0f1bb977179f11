"""Memory: how much of it caches may take, and whether a restore fits into the rest."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promptcache import config
from promptcache.errors import StoreError
from promptcache.units import format_size

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# Of the memory of the device, what caches may take where nobody says more.
CACHE_SHARE = 8


def cache_limit(nbytes: int | None = None) -> int:
    """Return how many bytes caches may take: so many, else the user's, else a share."""
    if nbytes is None:
        nbytes = config.memory_limit()
    return total_nbytes() // CACHE_SHARE if nbytes is None else nbytes


def total_nbytes() -> int:
    """Return how many bytes of memory the device has."""
    import mlx.core as mx

    info = mx.device_info()
    # As Metal and as CUDA calls it.
    if of_gpu := info.get("memory_size") or info.get("total_memory"):
        return int(of_gpu)
    of_system = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(of_system, _limit_of_container() or of_system)


def check_fits(nbytes: int) -> None:
    """Raise StoreError if so many bytes more do not fit into the memory that is free.

    A system that runs out of memory kills processes rather than tell them.
    """
    available = available_nbytes()
    if available is not None and nbytes > available:
        raise StoreError(
            f"{format_size(nbytes)} of cached rows do not fit into the "
            f"{format_size(available)} of memory that are free"
        )


def available_nbytes() -> int | None:
    """Return how many bytes the device can take, or None if that is not known."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        limits = [n for n in (_of_system(), _of_container()) if n is not None]
        return min(limits, default=None)
    return _of_gpu(mx.device_info(), mx.get_active_memory(), mx.get_cache_memory())


def _of_gpu(info: Mapping[str, Any], active: int, cached: int) -> int | None:
    """Return what is left by what MLX tells of a GPU; buffers it keeps are reused."""
    if "free_memory" in info:
        # CUDA, where other processes' memory counts as taken.
        return int(info["free_memory"]) + cached
    most = info.get("max_recommended_working_set_size")
    return None if most is None else max(int(most) - active, 0)


def _of_system() -> int | None:
    """Return what Linux thinks that it can give without swapping."""
    try:
        line = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text())
    except OSError:
        return None
    return None if line is None else int(line[1]) * 1024


def _of_container() -> int | None:
    """Return what is left of the limit of a container, as cgroup v2 tells it."""
    most = _limit_of_container()
    if most is None:
        return None
    try:
        used = int((CGROUP / "memory.current").read_text())
        stat = (CGROUP / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    # Pages of files that can be dropped count as used.
    dropped = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    return max(most - used + (int(dropped[1]) if dropped else 0), 0)


def _limit_of_container() -> int | None:
    try:
        return int((CGROUP / "memory.max").read_text())
    except (OSError, ValueError):
        # Without a limit, it is the word "max".
        return None
