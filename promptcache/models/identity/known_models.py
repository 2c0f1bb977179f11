"""Known models: the hashes of weights that were loaded from files before.

Hashing takes seconds, so it is done once. Files are told apart by what their file
system says of them, which is enough unless they changed a moment ago.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from promptcache.segments.fingerprint import hash_json

# A file that changes twice within the resolution of its times looks unchanged: 2 s on
# FAT, 1 s on HFS+, 10 ms on ext4. Git calls such an entry racy.
RACY_SECONDS = 2.0
HASH = re.compile("[0-9a-f]{32}")
# How many states to remember of one folder: other adapters and releases of mlx-lm.
MAX_STATES = 8


@dataclass(frozen=True, slots=True)
class FileState:
    """What the file system says of the files that a model is loaded from.

    Attributes:
        folder: The folder of the model.
        stats: For each file its name, size, mtime, ctime, inode and device.
        is_settled: Whether a later change cannot look the same.
    """

    folder: str
    stats: tuple[tuple[str | int, ...], ...]
    is_settled: bool = field(compare=False)


def state_of(folders: Sequence[Path], now: float | None = None) -> FileState | None:
    """Return the state of the files in some folders, None if they cannot be read.

    All files count: a model's own source may read any. A link counts as what it links
    to, so that the blobs of the Hugging Face cache are looked at.
    """
    now = time.time() if now is None else now
    try:
        statuses = [
            (entry.name, entry.stat())
            for folder in folders
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if entry.is_file()
        ]
    except OSError:
        return None
    stats = tuple(
        (name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)
        for name, s in statuses
    )
    is_settled = all(_is_settled(s, now) for _, s in statuses)
    return FileState(str(folders[0].resolve()), stats, is_settled)


def _is_settled(stat: os.stat_result, now: float) -> bool:
    # Anybody can set an mtime, also one that is still to come.
    return (
        now - stat.st_ctime >= RACY_SECONDS and abs(now - stat.st_mtime) >= RACY_SECONDS
    )


class KnownModels:
    """A file that remembers which weights were loaded from which files."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def weights_of(self, state: FileState, loader: str) -> str | None:
        """Return the hash of what was loaded from files in this state, if known.

        Args:
            state: The state of the files.
            loader: Whatever else decides what is loaded from them.
        """
        if not state.is_settled:
            return None
        weights = self._read().get(state.folder, {}).get(_key(state, loader))
        return weights if isinstance(weights, str) and HASH.fullmatch(weights) else None

    def remember(self, state: FileState, loader: str, weights: str) -> None:
        """Note what was loaded from files, unless they changed a moment before.

        Not being able to only costs hashing it again.
        """
        if not state.is_settled:
            return
        models = self._read()
        models = {f: s for f, s in models.items() if Path(f).is_dir()}
        states = models.pop(state.folder, {})
        states[_key(state, loader)] = weights
        models[state.folder] = dict([*states.items()][-MAX_STATES:])
        tmp = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            tmp.write_text(json.dumps(models))
            tmp.replace(self._path)
        except OSError:
            return

    def _read(self) -> dict[str, dict[str, object]]:
        try:
            models = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(models, dict):
            return {}
        return {f: s for f, s in models.items() if isinstance(s, dict)}


def _key(state: FileState, loader: str) -> str:
    return hash_json([state.stats, loader])
