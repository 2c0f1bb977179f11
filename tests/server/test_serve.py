"""The server: what it answers, and what it does not read again."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.helpers import tiny
from tests.helpers.commands import ok
from tests.helpers.marks import all_but
from tests.helpers.serving import (
    Messages,
    Server,
    ask,
    ask_at_once,
    running,
    system_and,
)

SYSTEM = "You are the narrator of a long story about a lighthouse. " * 12
QUESTIONS = [f"{n}: what do you see from window {n * 7}?" for n in range(8)]
MEMORY = ("--memory-limit", "64MB")
CONFIGS = {
    "llama": tiny.LLAMA,
    "gemma3_text": tiny.GEMMA3,
    "qwen3_next": tiny.QWEN3_NEXT,
}


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="module")
def server(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that tests share; each has a system prompt of its own."""
    with running(model_dir, *MEMORY, store=tmp_path_factory.mktemp("s")) as server:
        yield server


@pytest.fixture
def own(request: pytest.FixtureRequest) -> str:
    """A system prompt that no other test has."""
    return f"{request.node.name}: {SYSTEM}"


def chats(num_turns: int) -> list[Messages]:
    """Return the prompts of a chat, turn by turn, with answers that are given."""
    found = [system_and(SYSTEM, QUESTIONS[0])]
    for number in range(1, num_turns):
        answer = {"role": "assistant", "content": f"I see {number} ships."}
        question = {"role": "user", "content": QUESTIONS[number]}
        found.append([*found[-1], answer, question])
    return found


def test_restart_falls_back_to_disk(model_dir: Path, store_dir: Path) -> None:
    messages = system_and(SYSTEM, QUESTIONS[0])
    with running(model_dir, *MEMORY, store=store_dir) as server:
        cold = ask(server.client(), messages)
        hot = ask(server.client(), messages)
        server.kill()

    with running(model_dir, *MEMORY, store=store_dir) as server:
        warm = ask(server.client(), messages)

        assert server.metric("hits_total", tier="disk") == 1

    assert [a.cached_tokens for a in (cold, hot, warm)] == [
        *(0, cold.prompt_tokens - 1, cold.prompt_tokens - 1)
    ]
    assert cold.text == hot.text == warm.text


def test_prefixes_are_shared_with_the_commands(
    model_dir: Path, store_dir: Path
) -> None:
    ok("build", "-m", model_dir, "-s", SYSTEM, "--store", store_dir, "--name", "keeper")

    with running(model_dir, store=store_dir) as server:
        answer = ask(server.client(), system_and(SYSTEM, QUESTIONS[1]))
        code = server.stop()
    result = ok(
        *("generate", "-m", model_dir, "-s", SYSTEM, QUESTIONS[1], "--json"),
        *("--store", store_dir, "--max-tokens", "2"),
    )

    assert answer.prefilled_tokens < len(QUESTIONS[1]) + 10
    assert code == 0
    told = json.loads(result.stdout)
    assert told["cached_tokens"] >= told["prompt_tokens"] - 1


def test_same_prefix_is_read_once(server: Server, own: str) -> None:
    prompts = [system_and(own, question) for question in QUESTIONS]
    num_read = server.metric("tokens_prefilled_total")
    num_waits = server.metric("single_flight_waits_total")

    answers = ask_at_once(server, prompts)

    num_read = server.metric("tokens_prefilled_total") - num_read
    assert sorted(a.cached_tokens > len(SYSTEM) * 0.7 for a in answers) == [
        *(False, *[True] * 7)
    ]
    assert num_read <= answers[0].prompt_tokens + sum(len(q) + 12 for q in QUESTIONS)
    assert server.metric("single_flight_waits_total") > num_waits
    assert server.metric("waiting_requests") == 0


def test_same_prompt_is_read_once(server: Server, own: str) -> None:
    answers = ask_at_once(server, [system_and(own, QUESTIONS[0])] * 4)

    assert sorted(a.prefilled_tokens for a in answers)[:3] == [1, 1, 1]
    assert len({a.text for a in answers}) == 1


@pytest.mark.parametrize("architecture", all_but(["llama"], CONFIGS))
def test_answers_are_those_of_a_cold_run(
    tmp_path: Path, store_dir: Path, architecture: str
) -> None:
    model = tiny.save_model(tmp_path / architecture, CONFIGS[architecture])
    prompts = chats(4)

    with running(model, *MEMORY, store=store_dir) as server:
        hot = [ask(server.client(), prompt) for prompt in prompts]
    with running(model, *MEMORY, store=store_dir) as server:
        # The longest first, which nothing in memory leads to.
        warm = [ask(server.client(), prompt) for prompt in reversed(prompts)][::-1]
        again = ask_at_once(server, prompts)
    keys = [f"key-{number}" for number in range(len(prompts))]
    given = [argument for key in keys for argument in ("--api-key", key)]
    with running(model, *MEMORY, *given, store=tmp_path / "other") as server:
        # In a namespace of its own each finds nothing.
        clients = [server.client(key) for key in keys]
        cold = [ask(*asked) for asked in zip(clients, prompts, strict=True)]

    texts = [answer.text for answer in cold]
    assert [answer.text for answer in hot] == texts
    assert [answer.text for answer in warm] == texts
    assert [answer.text for answer in again] == texts
    assert all(a.cached_tokens == 0 for a in cold)
    assert all(a.prefilled_tokens < 60 for a in hot[1:])
    assert warm[-1].prefilled_tokens < 60
    assert all(a.prefilled_tokens < 120 for a in again)


@pytest.mark.parametrize("options", [{"seed": 5}, {"stop": ["!"]}, {"logprobs": True}])
def test_options_work_with_and_without_a_cache(
    server: Server, own: str, options: dict[str, object]
) -> None:
    messages = system_and(own, QUESTIONS[0])

    answers = [
        ask(server.client(), messages, stream=stream, temperature=0, **options)
        for stream in (False, False, True)
    ]

    assert len({answer.text for answer in answers}) == 1
    assert [answer.prefilled_tokens for answer in answers[1:]] == [1, 1]


def test_draft_model_shares_both_caches(
    server: Server, model_dir: Path, tmp_path: Path
) -> None:
    draft = tiny.save_model(tmp_path / "draft", tiny.LLAMA, seed=1)
    prompts = chats(3)
    plain = [ask(server.client(), prompt) for prompt in prompts]

    options = (*MEMORY, "--draft-model", draft)
    with running(model_dir, *options, store=tmp_path / "drafted") as speculating:
        drafted = [ask(speculating.client(), prompt) for prompt in prompts]
    with running(model_dir, *options, store=tmp_path / "drafted") as speculating:
        warm = ask(speculating.client(), prompts[-1])

    assert [a.text for a in drafted] == [a.text for a in plain]
    assert drafted[0].cached_tokens == 0
    assert all(a.prefilled_tokens < 60 for a in drafted[1:])
    assert warm.text == plain[-1].text
    assert warm.prefilled_tokens < 60


def test_quantized_caches_are_answered_right(model_dir: Path, store_dir: Path) -> None:
    options = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "200")
    with running(model_dir, *options, store=store_dir) as server:
        answers = [
            ask(server.client(), system_and(SYSTEM, QUESTIONS[0])) for _ in range(2)
        ]

    assert answers[0].text == answers[1].text


def test_other_model_falls_back_to_disk(
    model_dir: Path, tmp_path: Path, store_dir: Path
) -> None:
    other = tiny.save_model(tmp_path / "other", tiny.LLAMA, seed=3)
    messages = system_and(SYSTEM, QUESTIONS[0])

    allow = ("--allow-model", str(other))
    with running(model_dir, *allow, store=store_dir) as server:
        first = ask(server.client(), messages)
        swapped = ask(server.client(), messages, model=str(other))
        back = ask(server.client(), messages)

    assert (first.cached_tokens, swapped.cached_tokens) == (0, 0)
    assert back.prefilled_tokens == 1
    assert back.text == first.text


def test_model_that_is_none_leaves_the_one_that_is_loaded(
    server: Server, own: str, tmp_path: Path
) -> None:
    messages = system_and(own, QUESTIONS[0])
    first = ask(server.client(), messages)

    for name in ("no/such-model", str(tmp_path / "nowhere")):
        with pytest.raises(openai.NotFoundError, match="no"):
            ask(server.client(), messages, model=name)
        # It needs a model, and loads none.
        told = server.post("/v1/cache/explain", {"messages": messages})

        assert told["cached_tokens"] == first.prompt_tokens - 1


def test_memory_holds_no_more_than_its_limit(model_dir: Path, store_dir: Path) -> None:
    # 512 bytes a token of 700 each: room for two.
    with running(model_dir, "--memory-limit", "1MB", store=store_dir) as server:
        prompts = [system_and(f"{n} {SYSTEM}", QUESTIONS[0]) for n in range(6)]
        for prompt in prompts:
            ask(server.client(), prompt)
            assert server.metric("bytes", tier="memory") <= 10**6
        first = ask(server.client(), prompts[0])

        assert server.metric("evictions_total", tier="memory") > 0
        assert server.metric("hits_total", tier="disk") >= 1
    assert first.prefilled_tokens == 1


def test_disk_holds_no_more_than_its_limit(model_dir: Path, store_dir: Path) -> None:
    with running(model_dir, "--max-size", "3MB", store=store_dir) as server:
        for n in range(8):
            ask(server.client(), system_and(f"{n} {SYSTEM}", QUESTIONS[0]))
        server.wait_saved()

        assert 0 < server.metric("bytes", tier="disk") <= 3 * 10**6
        assert server.metric("evictions_total", tier="disk") > 0


def test_answers_are_not_stored_where_that_is_not_wanted(
    model_dir: Path, store_dir: Path
) -> None:
    with running(model_dir, "--no-save-answers", store=store_dir) as server:
        answer = ask(server.client(), system_and(SYSTEM, QUESTIONS[0]))
        listed = json.loads(server.get("/v1/cache"))["data"]

    assert max(p["num_tokens"] for p in listed) == answer.prompt_tokens
