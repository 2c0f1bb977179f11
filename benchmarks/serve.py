"""Serving: clients that share a system prompt, against mlx-lm's own server.

Both servers get the same requests at the same time, each from nothing, in turns.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import (
    Measurement,
    check_equal,
    median_ratio,
    narrate,
    options_parser,
    report,
)
from promptcache.models.default.download import ensure_default_model

WORDS = (
    "The lighthouse stands on a rock in the northern sea, and its keeper writes down "
    "every ship that passes, the weather, and what the gulls are doing. "
)
QUESTIONS = (
    "Which ship passed last?",
    "How is the weather today?",
    "What are the gulls doing?",
    "Who keeps the light?",
    "Where does it stand?",
    "When was it built?",
    "Why does nobody visit?",
    "Tell me about the rock.",
)


class Run(NamedTuple):
    """One load on one server.

    Attributes:
        seconds: From the first request to the last answer.
        tokens: Tokens of all answers.
        texts: The answers.
        cached_tokens: Prompt tokens that were not read, of each.
    """

    seconds: float
    tokens: int
    texts: list[str]
    cached_tokens: list[int]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, **env: str) -> Iterator[str]:
    """Run a server, and yield its URL once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **env},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=1).read()
                break
            time.sleep(0.1)
        # The model may be loading still.
        complete(url, [{"role": "user", "content": "Hello"}], max_tokens=2)
        yield url
    finally:
        process.kill()
        process.wait()


def complete(url: str, messages: list[dict[str, str]], max_tokens: int) -> Any:
    """Return what a server answers at temperature 0."""
    body = {
        "model": "default_model",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.read())


def load(url: str, system: str, num_clients: int, max_tokens: int) -> Run:
    """Ask questions after one system prompt, all at once."""
    barrier = threading.Barrier(num_clients)

    def one(question: str) -> Any:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
        ]
        barrier.wait()
        return complete(url, messages, max_tokens)

    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(num_clients)]
    started = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        answers = list(pool.map(one, questions))
    seconds = time.perf_counter() - started
    return Run(
        seconds,
        sum(a["usage"]["completion_tokens"] for a in answers),
        [a["choices"][0]["message"]["content"] or "" for a in answers],
        [_cached(a["usage"]) for a in answers],
    )


def _cached(usage: Any) -> int:
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))


def compare(
    model: Path, *, words: int, num_clients: int, max_tokens: int, trials: int
) -> list[tuple[Run, Run]]:
    """Return what promptcache and mlx-lm took, trial by trial, in turns."""
    runs = []
    system = " ".join((WORDS * 100).split()[:words])
    for trial in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            ours = ["promptcache_cli", "serve", "--model", str(model)]
            plain = ["mlx_lm", "server", "--model", str(model)]
            prompt = f"Day {trial}. {system}"

            def run(command: list[str], port: int, text: str = prompt) -> Run:
                with serving(command, port, PROMPTCACHE_DIR=folder) as url:
                    return load(url, text, num_clients, max_tokens)

            runs.append((run(ours, 18321), run(plain, 18322)))
    return runs


def measurements(runs: Sequence[tuple[Run, Run]]) -> list[Measurement]:
    """Return how fast each server answered, against the other one."""
    ours, plain = zip(*runs, strict=True)
    speeds = [[run.tokens / run.seconds for run in side] for side in (ours, plain)]
    ratio = median_ratio(*speeds)
    return [
        Measurement(
            {"server": "promptcache"}, "tokens/s", speeds[0], {"mlx-lm": ratio}
        ),
        Measurement({"server": "mlx-lm"}, "tokens/s", speeds[1]),
        *(
            Measurement(
                {"server": f"{name}, all answers"}, "s", [r.seconds for r in side]
            )
            for name, side in (("promptcache", ours), ("mlx-lm", plain))
        ),
    ]


def check(runs: Sequence[tuple[Run, Run]]) -> None:
    """Raise AssertionError unless both servers gave the same answers."""
    for ours, plain in runs:
        check_equal("the answers", ours.texts, plain.texts)
        narrate(f"tokens of prompts that were not read: {ours.cached_tokens}")


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, trials=3)
    parser.add_argument("--model", help="folder, else the embedded default")
    parser.add_argument("--words", type=int, default=800)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=24)
    given = parser.parse_args()
    model = Path(given.model) if given.model else ensure_default_model()
    runs = compare(
        model,
        words=given.words,
        num_clients=given.clients,
        max_tokens=given.max_tokens,
        trials=given.trials,
    )
    check(runs)
    report("serve", measurements(runs), file=given.json)


if __name__ == "__main__":
    main()
