"""`promptcache batch` answers a file of prompts, and goes on where it was."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import assert_fails, invoke, ok

SYSTEM = "You are the keeper of a lighthouse. " * 8


@pytest.fixture
def run(model_dir: Path, tmp_path: Path) -> Any:
    """Return a function that answers lines, and returns the answers by number."""

    def run(*lines: Any, options: tuple[Any, ...] = (), code: int = 0) -> Any:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        source.write_text("".join(f"{text}\n" for text in texts))
        store = ("--store", tmp_path / "store", "--max-tokens", "8")
        command = ("batch", source, "-o", target, "-m", model_dir, *store, *options)
        result = invoke(*command)
        assert result.exit_code == code, result.output
        answers = [json.loads(line) for line in target.read_text().splitlines()]
        assert len({answer["index"] for answer in answers}) == len(answers)
        return {answer["index"]: answer for answer in answers}

    return run


def test_answers_are_those_of_generate(
    run: Any, model_dir: Path, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Who is there?"}]
    lines = [{"prompt": f"Window {n}?", "id": f"w{n}"} for n in range(5)]

    answers = run(*lines, {"messages": messages}, options=("-s", SYSTEM))

    for n in range(5):
        asked = ("generate", "-m", model_dir, "-s", SYSTEM, f"Window {n}?", "--json")
        told = json.loads(
            ok(
                *asked, "--no-cache", "--max-tokens", "8", "--store", tmp_path / "o"
            ).stdout
        )
        assert answers[n]["text"] == told["text"]
        assert answers[n]["id"] == f"w{n}"
        assert answers[n]["generation_tokens"] == told["generation_tokens"]
    assert "id" not in answers[5] and answers[5]["text"]


def test_line_that_fails_is_a_line_with_its_error(run: Any) -> None:
    lines = [
        {"prompt": "Hello"},
        "{not json",
        [1],
        {"prompt": "a", "messages": []},
        {"prompt": 7},
        {"prompt": "a", "temperature": 1},
        {"prompt": "a", "max_tokens": "many"},
        {"prompt": "a", "max_tokens": 0},
        {"messages": 7},
        {"prompt": "Bye", "max_tokens": 3},
    ]

    answers = run(*lines, code=1)

    assert [n for n in range(10) if "error" not in answers[n]] == [0, 9]
    assert all("\n" not in answers[n]["error"] for n in range(1, 9))
    assert answers[9]["generation_tokens"] == 3


def test_what_is_done_is_not_done_again(run: Any, tmp_path: Path) -> None:
    lines = [{"prompt": f"Window {n}?"} for n in range(6)]
    first = run(*lines)
    target = tmp_path / "out.jsonl"
    done = target.read_text().splitlines(keepends=True)
    # As a crash leaves it.
    target.write_text("".join(done[:3]) + done[3][:20])

    again = run(*lines)

    # What was read before is cached now.
    texts = [
        {n: answer["text"] for n, answer in each.items()} for each in (first, again)
    ]
    assert texts[0] == texts[1]
    assert target.read_text().splitlines(keepends=True)[:3] == done[:3]


def test_failed_lines_are_tried_again(run: Any, tmp_path: Path) -> None:
    run({"prompt": "a"}, {"prompt": 7}, code=1)
    target = tmp_path / "out.jsonl"
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert any("error" in answer for answer in answers)

    assert run({"prompt": "a"}, {"prompt": 7}, code=1)[1]["error"]


def test_answers_of_another_file_are_refused(
    run: Any, model_dir: Path, tmp_path: Path
) -> None:
    run({"prompt": "a"})
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "b"}\n')

    result = invoke("batch", other, "-o", tmp_path / "out.jsonl", "-m", model_dir)

    assert_fails(result, 2, "out.jsonl", "something else")


def test_interrupted_batch_keeps_what_is_done(model_dir: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": f"Window {n}?", "max_tokens": 4 + 900 * (n > 2)} for n in range(6)
    ]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = ["-m", "promptcache_cli", "batch", source, "-o", target, "-m", model_dir]
    process = subprocess.Popen([sys.executable, *map(str, command)])
    until = time.monotonic() + 60
    while not target.exists() or not target.read_text():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)

    assert process.wait(30) == 130
    done = [json.loads(line) for line in target.read_text().splitlines()]
    assert done and all(answer["generation_tokens"] <= 904 for answer in done)
