"""The server with the embedded default model: chats that survive, and crowds."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from promptcache.models.default.download import ensure_default_model
from tests.helpers.marks import all_but
from tests.helpers.serving import (
    Messages,
    Server,
    ask,
    ask_at_once,
    running,
    system_and,
)

NARRATOR = Path(__file__).parents[2] / "docs" / "examples" / "narrator.txt"
SYSTEM = "You are the narrator of a text adventure. Answer in one short sentence."
TURNS = (
    "I open the door of the lighthouse.",
    "What is on the table?",
    "I take the lamp and climb the stairs.",
    "Who lives up here?",
    "I read the keeper's book aloud.",
    "What does the last page say?",
    "I look out of the window at the sea.",
    "Is there a ship?",
    "I light the lamp for it.",
    "How does the night end?",
)
MEMORY = ("--memory-limit", "1GB")
# What a chat template puts around a user's text, and before the answer.
AROUND = 12


@pytest.fixture(scope="module")
def plain() -> Any:
    """The model as mlx-lm loads it."""
    return mlx_lm.load(str(ensure_default_model()))


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


def cold_text(plain: Any, messages: Messages, max_tokens: int) -> str:
    """Return what plain mlx-lm answers, reading everything."""
    model, tokenizer = plain
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    responses = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens)
    text = "".join(response.text for response in responses)
    mx.clear_cache()
    return text


def num_tokens(plain: Any, text: str) -> int:
    return len(plain[1].encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("num_turns", "max_tokens"), all_but([(3, 8)], [(3, 8), (len(TURNS), 20)])
)
def test_chat_survives_a_kill_and_reads_only_what_is_new(
    plain: Any, store_dir: Path, num_turns: int, max_tokens: int
) -> None:
    turns = TURNS[:num_turns]
    servers: list[Server] = [Server(None, *MEMORY, store=store_dir)]
    messages = system_and(SYSTEM)
    answers, cold = [], []
    try:
        for number, said in enumerate(turns):
            messages.append({"role": "user", "content": said})
            answers.append(ask(servers[-1].client(), messages, max_tokens=max_tokens))
            cold.append(cold_text(plain, messages, max_tokens))
            messages.append({"role": "assistant", "content": answers[-1].text})
            if number == num_turns // 2 - 1:
                servers[-1].kill()
                servers.append(Server(None, *MEMORY, store=store_dir))
        from_disk = servers[-1].metric("hits_total", tier="disk")
    finally:
        for server in servers:
            server.kill()

    assert [answer.text for answer in answers] == cold
    assert answers[0].cached_tokens == 0
    new = [num_tokens(plain, said) + AROUND for said in turns]
    assert [
        answer.prefilled_tokens <= most
        for answer, most in zip(answers[1:], new[1:], strict=True)
    ] == [True] * (num_turns - 1)
    assert from_disk == 1


@pytest.fixture
def crowd() -> list[Messages]:
    """Eight clients' prompts after one system prompt of 1,000 tokens."""
    words = itertools.cycle(NARRATOR.read_text().split())
    system = " ".join(itertools.islice(words, 880))
    questions = [f"{said} Answer in one sentence." for said in TURNS[:8]]
    return [system_and(system, question) for question in questions]


@pytest.mark.long
def test_crowd_reads_one_system_prompt_once(
    plain: Any, store_dir: Path, tmp_path: Path, crowd: Sequence[Messages]
) -> None:
    with running(None, *MEMORY, store=store_dir) as server:
        together = ask_at_once(server, crowd, max_tokens=8)
        num_read = server.metric("tokens_prefilled_total")
        waits = server.metric("single_flight_waits_total")
    with running(None, *MEMORY, store=tmp_path / "other") as server:
        alone = [ask(server.client(), messages, max_tokens=8) for messages in crowd]

    system = num_tokens(plain, crowd[0][0]["content"])
    questions = [num_tokens(plain, m[1]["content"]) + AROUND for m in crowd]
    assert 950 < system < 1100
    assert num_read <= system + sum(questions) + AROUND
    assert waits > 0
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert alone[0].text == cold_text(plain, crowd[0], 8)
