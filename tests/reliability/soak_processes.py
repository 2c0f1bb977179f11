"""Many processes in one store: for a long time.

Each process does one kind of work, again and again, and ends with an error if anything
is not as it should be. `make soak` runs this for five minutes, kills 500 processes at
random times and tries many more damaged bytes; the tests run short forms of each.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from subprocess import PIPE, Popen

from promptcache.errors import StoreError, StoreFullError
from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers.segments import TINY, check_match, files_nbytes, save
from tests.helpers.workers import prompt_of

JOBS = ("build", "build", "generate", "save", "save", "save", "prune", "verify")
LIMIT_NBYTES = 3_000_000
# The largest blob that a process of these writes, with what its rows may take.
SEGMENT_NBYTES = 300_000
# What SQLite's WAL and shared memory grow to between two looks at the size.
WAL_NBYTES = 4_200_000


def work(job: str, folder: Path, seconds: float, seed: int, model_dir: str) -> int:
    """Do a job for some time, at least once; return how often it was done."""
    deadline = time.monotonic() + seconds
    random_ = random.Random(seed)
    warnings.simplefilter("error")
    if job in ("build", "generate"):
        return generate(job, folder, deadline, random_, model_dir)
    num_done = 0
    with PrefixStore(folder, max_nbytes=LIMIT_NBYTES + WAL_NBYTES) as store:
        while not num_done or time.monotonic() < deadline:
            if job == "save":
                save_and_read(store, random_)
            elif job == "prune":
                limit = LIMIT_NBYTES * random_.random()
                policy = PrunePolicy(max_nbytes=int(limit))
                store.execute(store.plan_prune(policy))
                check_size(folder)
                time.sleep(random_.random() / 5)
            else:
                report = store.verify(fix=random_.random() < 0.5)
                assert not report.damaged, report.damaged
            num_done += 1
    return num_done


def check_size(folder: Path) -> None:
    """Assert that no more than a segment is over the limit, whoever writes."""
    nbytes = files_nbytes_now(folder)
    most = LIMIT_NBYTES + WAL_NBYTES + SEGMENT_NBYTES
    assert nbytes <= most, f"{nbytes} bytes"


def files_nbytes_now(folder: Path) -> int:
    while True:
        try:
            return files_nbytes(folder)
        except FileNotFoundError:
            # Something went away while it was looked at.
            continue


def save_and_read(store: PrefixStore, random_: random.Random) -> None:
    prompt = prompt_of(random_.randrange(500))
    try:
        save(store, prompt, width=random_.choice([1, 50, 200]))
    except StoreFullError:
        return
    except StoreError as error:
        # A rival's prune takes what this was about to hang on; a generation warns.
        assert "evict" in str(error), error
        return
    match = store.lookup(prompt, TINY)
    try:
        check_match(store, match, prompt)
    except FileNotFoundError:
        return
    except StoreError as error:
        assert "missing" in str(error), error


def generate(
    job: str, folder: Path, deadline: float, random_: random.Random, model_dir: str
) -> int:
    """Build or generate with a real model; the tokens are always the right ones."""
    from promptcache import CachedGenerator, PromptCacheWarning

    warnings.filterwarnings(
        "default",
        "cached segment|going on without|.*not saved|.*cannot be",
        PromptCacheWarning,
    )
    limit = LIMIT_NBYTES + WAL_NBYTES
    plain: dict[int, list[int]] = {}
    num_done = 0
    with CachedGenerator.load(
        model_dir, store=folder, max_nbytes=limit, memory_limit=0, save=True
    ) as generator:
        while not num_done or time.monotonic() < deadline:
            which = random_.randrange(4)
            prompt = [which, *range(100, 150 + 10 * which)]
            if job == "build":
                try:
                    generator.build(prompt, prefill_step_size=32)
                except StoreError as error:
                    assert "evict" in str(error), error
            else:
                told = [r.token for r in generator.stream_generate(prompt, 4)]
                if which not in plain:
                    answer = generator.stream_generate(
                        prompt, 4, reuse=False, save=False
                    )
                    plain[which] = [r.token for r in answer]
                assert told == plain[which], "a wrong token"
            num_done += 1
    return num_done


def start(
    job: str, folder: Path, seconds: float, seed: int, model: Path
) -> "Popen[str]":
    """Start a process that does a job."""
    arguments = [job, str(folder), str(seconds), str(seed), str(model)]
    command = [sys.executable, "-m", __spec__.name, *arguments]
    return Popen(command, stdout=PIPE, stderr=PIPE, text=True)


def run(seconds: float, seed: int) -> dict[str, int]:
    """Let eight processes work in one store; return how often each job was done."""
    from tests.helpers import tiny
    from tests.helpers.invariants import check_invariants

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place, "store")
        model_dir = tiny.save_model(Path(place, "model"), tiny.LLAMA)
        processes = [
            (job, start(job, folder, seconds, seed + i, model_dir))
            for i, job in enumerate(JOBS)
        ]
        done: dict[str, int] = {}
        for job, process in processes:
            output, errors = process.communicate(timeout=seconds + 120)
            assert process.returncode == 0, f"seed {seed}, {job}: {errors}"
            assert "locked" not in errors, f"seed {seed}, {job}: {errors}"
            done[job] = done.get(job, 0) + int(output.split()[-1])
        check_invariants(folder)
        with PrefixStore(folder) as store:
            assert store.verify().is_sound
            store.execute(store.plan_prune(PrunePolicy()))
            assert not list((folder / "tmp").iterdir())
    return done


def soak(seconds: float) -> None:
    """Run the long forms of all, and print what they came through."""
    seed = int(os.environ.get("SEED", time.time_ns() % 10**9))
    print(f"SEED={seed}", flush=True)
    print(f"{len(JOBS)} processes, {seconds:.0f} s: {run(seconds, seed)}", flush=True)
    crash = [sys.executable, "-m", "tests.reliability.crash"]
    killed = subprocess.run(
        [*crash, "random", "500", str(seed)], check=True, stdout=PIPE, text=True
    )
    print(f"killed at random times: {killed.stdout.strip()}", flush=True)
    fuzz = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(Path(__file__).with_name("test_bad_bytes.py")),
    ]
    command = [*fuzz, f"--hypothesis-seed={seed}"]
    subprocess.run(command, check=True, env={**os.environ, "FUZZ": "60"})


def main(*arguments: str) -> None:
    if len(arguments) < 2:
        soak(float(arguments[0]) if arguments else 300.0)
    else:
        job, folder, seconds, seed, model_dir = arguments
        print(work(job, Path(folder), float(seconds), int(seed), model_dir))


if __name__ == "__main__":
    main(*sys.argv[1:])
