"""Time to first token: cold, warm, and with mlx-lm's own prompt-cache file.

Every trial is a process of its own; the page cache is warm for both files. Run with
`make bench`, or `python -m benchmarks.ttft --trials 5`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import NARRATOR, machine, median_and_spread, print_table

QUESTION = "I open the door"


def main() -> None:
    """Measure, check that all answers are equal, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as folder:
        store, file = Path(folder, "store"), Path(folder, "mlx-lm.safetensors")
        promptcache("build", store, "-s", f"@{NARRATOR}")
        mlx_lm_file("save", file)
        # In turn, so that whatever else the machine does hits all of them.
        runs = [
            (
                promptcache("generate", store, *ask(), "--no-cache"),
                promptcache("generate", store, *ask()),
                mlx_lm_file("load", file),
            )
            for _ in range(trials)
        ]
    assert len({tuple(run["token_ids"]) for turn in runs for run in turn}) == 1
    print(
        f"{machine()}, {trials} trials, prefix of {runs[0][1]['cached_tokens']} tokens"
    )
    names = ["cold", "promptcache, warm", "mlx-lm's file"]
    seconds = [
        [run["ttft_seconds"] for run in column] for column in zip(*runs, strict=True)
    ]
    cold = statistics.median(seconds[0])
    print_table(
        ["run", "time to first token", "against cold"],
        [
            [name, median_and_spread(s), f"{cold / statistics.median(s):.1f} ×"]
            for name, s in zip(names, seconds, strict=True)
        ],
    )


def ask() -> list[str]:
    """Return the arguments of the question."""
    return ["-s", f"@{NARRATOR}", QUESTION, "--max-tokens", "16"]


def promptcache(command: str, store: Path, *arguments: str) -> dict:
    """Run a command of promptcache and return its JSON."""
    call = ["promptcache", command, "--store", str(store), "--json", *arguments]
    return json.loads(subprocess.run(call, check=True, capture_output=True).stdout)


def mlx_lm_file(action: str, file: Path) -> dict:
    """Save or use mlx-lm's own file in a process of its own."""
    call = [sys.executable, "-m", "benchmarks.mlx_lm_file", action, str(file), QUESTION]
    return json.loads(subprocess.run(call, check=True, capture_output=True).stdout)


if __name__ == "__main__":
    main()
