"""What other processes do to a store.

Use: `python -m tests.helpers.workers JOB FOLDER [NUMBER]`.
"""

import contextlib
import itertools
import os
import random
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

from promptcache.errors import StoreFullError
from promptcache.segments.chain import Chain
from promptcache.segments.types import EncodedSegment, SegmentInfo, Tensor
from promptcache.store import PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Database, Index
from promptcache.store.maintenance import rebuild
from promptcache.store.reports import PrunePolicy
from promptcache.store.types import RequestUsage
from tests.helpers.blobs import write_blob
from tests.helpers.segments import TINY, save, tokens


def start(job: str, folder: Path, number: int = 0) -> "Popen[str]":
    """Start another process that does a job."""
    command = [sys.executable, "-m", __spec__.name, job, str(folder), str(number)]
    return Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)


def finish(processes: list["Popen[str]"]) -> list[str]:
    """Let processes begin their work at once, and return what they print."""
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n", process.communicate()
    outputs = []
    for process in processes:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert not errors
        outputs.append(output)
    return outputs


def ready() -> None:
    """Wait until everybody is ready."""
    print("ready", flush=True)
    sys.stdin.read()


def prompt_of(seed: int) -> list[int]:
    """Return a prompt that forks from others at random places."""
    random_ = random.Random(seed)
    fork = random_.randrange(1, 100)
    return [*tokens(fork), *(random_.randrange(1000) for _ in range(30))]


def open_index(folder: Path, number: int) -> None:
    """Open the same new index as everybody else."""
    ready()
    created: list[Index] = []
    Index(folder / "index.db", populate=created.append)
    print(bool(created))


def open_store(folder: Path, number: int) -> None:
    """Open the same store as everybody else, and save something."""
    ready()
    with PrefixStore(folder) as store:
        print(save(store, [number, *tokens(40)]))


def obey(folder: Path, number: int) -> None:
    """Do one job after another, as `elsewhere` asks for them."""
    for line in sys.stdin:
        job, path, number_ = line.split()
        globals()[job](Path(path), int(number_))
        print("done", flush=True)


def elsewhere(process: "Popen[str]", job: str, folder: Path, number: int = 0) -> None:
    """Let a process that obeys do a job."""
    assert process.stdin
    assert process.stdout
    print(job, folder, number, file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n"


def list_prefixes(folder: Path, number: int) -> None:
    """Open and close a store, as `promptcache ls` does."""
    with PrefixStore(folder) as store:
        store.prefixes()


def save_one(folder: Path, number: int) -> None:
    """Save one prompt."""
    with PrefixStore(folder) as store:
        save(store, [number, *tokens(40)])


def save_pinned(folder: Path, number: int) -> None:
    """Save one prompt, and pin it."""
    with PrefixStore(folder) as store:
        store.pin(save(store, [number, *tokens(40)]), "pinned")


def set_index_aside(folder: Path, number: int) -> None:
    """Set an index aside as one that is damaged."""
    rebuild.quarantine_index(Database(folder / "index.db"), BlobFolder(folder))


def open_often(folder: Path, number: int) -> None:
    """Save some prompts, each in a store that is opened for it and closed."""
    for i in range(number, number + 8):
        save_one(folder, i)


def live(folder: Path) -> None:
    """Do once what is ever done to a store."""
    for damage in (lambda: None, (folder / "index.db").unlink, lambda: spoil(folder)):
        damage()
        with PrefixStore(folder) as store, PrefixStore(folder) as other:
            key = save(store, tokens(100))
            store.pin(key, "name")
            other.usage_log.record(
                RequestUsage(TINY, other.lookup(tokens(100), TINY), 1, 1, 0.1, 0.1)
            )
            store.verify(fix=True)
            store.remove(key)
            store.segments.give_up(save(other, tokens(90)))
            other.execute(other.plan_prune(PrunePolicy(max_nbytes=0)))


def spoil(folder: Path) -> None:
    """Damage the index inside, without opening it as Python does."""
    os.truncate(folder / "index.db", 5000)


def make_secret(folder: Path, number: int) -> None:
    """Ask for the secret of the same store as everybody else."""
    with PrefixStore(folder) as store:
        ready()
        print(store.secret().hex())


def add_rows(folder: Path, number: int) -> None:
    """Add and remove rows as fast as possible."""
    ready()
    index = Index(folder / "index.db")
    for i in range(60):
        token_ids = [number, i, *tokens(40)]
        chain = Chain(TINY.digest, token_ids)
        key = chain.key_at(len(chain))
        info = SegmentInfo(key, TINY.digest, TINY, 0, len(chain), True, 1.0)
        index.add_segment(info, chain, parent_key=None, nbytes=1)
        if i % 2:
            assert index.remove_leaf(key)
    index.database.close()


def save_some(folder: Path, number: int) -> None:
    """Save prompts that fork from those of other processes."""
    ready()
    with PrefixStore(folder) as store:
        for i in range(25):
            print(save(store, prompt_of(100 * number + i)), flush=True)


def save_forever(folder: Path, number: int) -> None:
    """Save prompts until killed; print the number of each one that is saved."""
    with PrefixStore(folder) as store:
        for i in itertools.count(number):
            save(store, prompt_of(i), width=8)
            print(i, flush=True)


# The largest segment that `save_wide` writes, with its header and rows.
WIDE_NBYTES = 4 * 400 * 130 + 32 * 1024


def save_wide(folder: Path, number: int) -> None:
    """Save much for a while in a store that is full."""
    deadline = time.monotonic() + 4
    with PrefixStore(folder, max_nbytes=number) as store:
        while time.monotonic() < deadline:
            first = random.randrange(10**6)
            with contextlib.suppress(StoreFullError):
                save(store, [first, *prompt_of(first)], width=400)


def prune_some(folder: Path, number: int) -> None:
    """Sweep garbage again and again while others save."""
    ready()
    deadline = time.monotonic() + 2
    with PrefixStore(folder) as store:
        while time.monotonic() < deadline:
            store.execute(store.plan_prune(PrunePolicy()))


def save_for_a_while(folder: Path, number: int) -> None:
    """Save prompts while others prune."""
    ready()
    deadline = time.monotonic() + 2
    with PrefixStore(folder) as store:
        for i in itertools.count(number):
            if time.monotonic() > deadline:
                break
            save(store, prompt_of(i))
            print(i)


def hold_build(folder: Path, number: int) -> None:
    """Hold the lock of a build until killed."""
    key = f"{number:032x}" if number else "ab" * 16
    with PrefixStore(folder) as store, store.segments.building(key, lambda: None):
        print("ready", flush=True)
        sys.stdin.read()


def hold_write(folder: Path, number: int) -> None:
    """Hold the write lock until told to stop."""
    index = Index(folder / "index.db")
    with index.database.writing():
        print("ready", flush=True)
        sys.stdin.read()


def hold_room(folder: Path, number: int) -> None:
    """Hold the lock of whoever makes room and writes."""
    with BlobFolder(folder).files.write_lock():
        print("ready", flush=True)
        sys.stdin.read()


def hold_read(folder: Path, number: int) -> None:
    """Hold one state of the index, so that its WAL cannot be emptied."""
    index = Index(folder / "index.db")
    with index.database.reading():
        index.segment_keys()
        print("ready", flush=True)
        sys.stdin.read()


def publish_much(folder: Path, number: int) -> None:
    """Publish a blob of many bytes, which takes a moment."""
    data = memoryview(bytes(number))
    segment = EncodedSegment("[]", [Tensor("token_ids", "U8", (number,), data)])
    info = SegmentInfo("ab" * 16, TINY.digest, TINY, 0, number, True, 1.0)
    write_blob(BlobFolder(folder), info, segment)


if __name__ == "__main__":
    os.umask(0)
    globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
