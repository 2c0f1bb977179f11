"""The server: what it answers, and what it does not read again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from commands import ok
from serving import Server, ask, ask_at_once, running, system_and, wait_until

SYSTEM = "You are the narrator of a long story about a lighthouse. " * 12
QUESTIONS = [f"{n}: what do you see from window {n * 7}?" for n in range(8)]


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def server(model_dir: Path, store_dir: Path) -> Iterator[Server]:
    with running(model_dir, "--memory-limit", "64MB", store=store_dir) as server:
        yield server


def test_second_turn_reads_only_what_is_new(server: Server) -> None:
    messages = system_and(SYSTEM, QUESTIONS[0])

    first = ask(server.client(), messages, max_tokens=5)
    again = ask(server.client(), messages, max_tokens=5)

    assert first.cached_tokens == 0
    assert again.cached_tokens == again.prompt_tokens - 1
    assert again.text == first.text


def test_restart_falls_back_to_disk(model_dir: Path, store_dir: Path) -> None:
    messages = system_and(SYSTEM, QUESTIONS[0])
    with running(model_dir, store=store_dir) as server:
        first = ask(server.client(), messages)
        server.kill()

    with running(model_dir, store=store_dir) as server:
        again = ask(server.client(), messages)

        assert server.metric("hits_total", tier="disk") == 1

    assert again.cached_tokens == again.prompt_tokens - 1
    assert again.text == first.text


def test_built_prefix_is_hit(model_dir: Path, store_dir: Path) -> None:
    ok("build", "-m", model_dir, "-s", SYSTEM, "--store", store_dir, "--name", "keeper")

    with running(model_dir, store=store_dir) as server:
        answer = ask(server.client(), system_and(SYSTEM, QUESTIONS[1]))

    assert answer.prefilled_tokens < len(QUESTIONS[1]) + 10


def test_served_prefix_is_hit_by_the_command(model_dir: Path, store_dir: Path) -> None:
    import json

    with running(model_dir, store=store_dir) as server:
        ask(server.client(), system_and(SYSTEM, QUESTIONS[1]))
        server.wait_saved()

    result = ok(
        *("generate", "-m", model_dir, "-s", SYSTEM, QUESTIONS[1], "--json"),
        *("--store", store_dir, "--max-tokens", "2"),
    )

    told = json.loads(result.stdout)
    assert told["cached_tokens"] >= told["prompt_tokens"] - 1


def test_same_prefix_is_read_once(server: Server) -> None:
    prompts = [system_and(SYSTEM, question) for question in QUESTIONS]
    alone = [ask(server.client(), p, extra_body={"seed": 1}) for p in prompts[:2]]
    other = [system_and(f"No. {SYSTEM}", question) for question in QUESTIONS]
    before = server.metric("tokens_prefilled_total")

    answers = ask_at_once(server, other)

    read = server.metric("tokens_prefilled_total") - before
    assert read <= answers[0].prompt_tokens + sum(len(q) + 12 for q in QUESTIONS[1:])
    assert server.metric("single_flight_waits_total") >= 1
    assert len(alone) == 2


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_next"])
def test_answers_are_those_of_a_cold_run(
    tmp_path: Path, store_dir: Path, architecture: str
) -> None:
    configs = {
        "llama": tiny.LLAMA,
        "gemma3_text": tiny.GEMMA3,
        "qwen3_next": tiny.QWEN3_NEXT,
    }
    model = tiny.save_model(tmp_path / architecture, configs[architecture])
    chats = [system_and(SYSTEM, QUESTIONS[0])]
    for number in range(1, 4):
        more = system_and("", f"I see {number} ships.", QUESTIONS[number])
        said = [
            {"role": role, "content": m["content"]}
            for role, m in zip(("assistant", "user"), more[1:], strict=True)
        ]
        chats.append([*chats[-1], *said])

    with running(model, store=store_dir) as server:
        hot = [ask(server.client(), chat) for chat in chats]
    with running(model, store=store_dir) as server:
        warm = [ask(server.client(), chat) for chat in reversed(chats)][::-1]
    cold = []
    for number, chat in enumerate(chats):
        with running(model, store=tmp_path / f"cold-{number}") as server:
            cold.append(ask(server.client(), chat))

    assert [a.text for a in hot] == [a.text for a in cold]
    assert [a.text for a in warm] == [a.text for a in cold]
    assert all(a.cached_tokens == 0 for a in cold)
    assert all(a.cached_tokens >= len(SYSTEM) * 0.7 for a in hot[1:])
    assert all(a.prefilled_tokens < 60 for a in warm)


def test_waiting_is_over_when_the_leader_hangs_up(server: Server) -> None:
    wait_until(lambda: server.metric("waiting_requests") == 0)
