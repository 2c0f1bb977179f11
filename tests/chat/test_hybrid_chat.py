"""A chat with a hybrid model: each turn reads only what is new, and stays small."""

import functools
import random
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from promptcache import CachedGenerator, PrefixStore, UsageError
from promptcache.prompts.render import RenderedPrompt
from promptcache.segments.blob_format import BlobHeader
from tests.architectures import architectures
from tests.architectures.conformance import CountingModel
from tests.helpers import tiny
from tests.helpers.templates import REAL_TEMPLATES
from tests.helpers.thinking import THINKING_TEMPLATE, headers, shared_tokens

NUM_TURNS = 20
SYSTEM = "You are the keeper of the lighthouse. " * 8


class Turn(NamedTuple):
    """What one turn of a chat cost."""

    prompt: list[int]
    answer: list[int]
    cached_tokens: int
    num_read: int


@functools.cache
def tiny_model() -> Any:
    """Return a model with linear attention in some of its layers."""
    return architectures.build("qwen3_next")


class Chat:
    """A conversation that is saved after each turn."""

    def __init__(self, folder: Path, template: str) -> None:
        """Make the model and its tokenizer."""
        model = tiny_model()
        folder.mkdir()
        tiny.save_tokenizer(folder, template)
        self.model = CountingModel(model)
        self.store = PrefixStore(folder / "store")
        self.generator = CachedGenerator(
            self.model,
            load_tokenizer(folder),
            store=self.store,
        )
        self.generator.tokenizer.eos_token_ids = set()
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]

    def turn(self, number: int) -> Turn:
        """Say something, and note what the answer cost."""
        said = f"Turn {number}: what do you see from your window, old friend?"
        self.messages.append({"role": "user", "content": said})
        before = self.model.num_read
        answer = list(
            self.generator.stream_generate(self.messages, max_tokens=24, save=True)
        )
        num_read = self.model.num_read - before - (len(answer) - 1)
        content = f"I think|I see {number} ships and a gull on the rail."
        self.messages.append({"role": "assistant", "content": content})
        return Turn(
            self.generator.render(self.messages[:-1]).token_ids,
            [response.token for response in answer],
            answer[-1].cached_tokens,
            num_read,
        )

    def cold(self) -> list[int]:
        """Answer the last turn from nothing."""
        options = {"max_tokens": 24, "save": False, "reuse": False}
        answer = self.generator.stream_generate(self.messages[:-1], **options)
        return [response.token for response in answer]


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(tmp_path / "chat", tiny.CHAT_TEMPLATE)


def tensor_nbytes(header: BlobHeader) -> int:
    """Return the size of a blob's tensors, but for the token ids."""
    sizes = {"F32": 4, "U32": 4}
    return sum(
        int(np.prod(spec.shape)) * sizes[spec.dtype]
        for spec in header.tensors
        if spec.name != "token_ids"
    )


def test_second_turn_reads_only_that_turn(chat: Chat) -> None:
    first = chat.turn(0)

    second = chat.turn(1)

    assert first.cached_tokens == 0
    assert second.prompt[: len(first.prompt)] == first.prompt
    # The state is taken before the last token, which is read alone.
    assert second.cached_tokens == len(first.prompt) - 1
    assert second.num_read == len(second.prompt) - len(first.prompt) + 1
    assert second.answer == chat.cold()


def test_turn_after_dropped_thinking_resumes_at_the_end_of_the_users_message(
    tmp_path: Path,
) -> None:
    template = THINKING_TEMPLATE.replace("<|assistant|>{%", "<|assistant|>think:{%")
    chat = Chat(tmp_path / "chat", template)
    first = chat.turn(0)

    second = chat.turn(1)

    shared = shared_tokens(first.prompt, second.prompt)
    assert shared < len(first.prompt)
    header = len(first.prompt) - shared
    assert shared - header - 2 <= second.cached_tokens <= shared
    assert second.num_read == len(second.prompt) - second.cached_tokens
    assert second.answer == chat.cold()


def test_long_chat_reads_each_turn_once_and_keeps_at_most_12_checkpoints(
    chat: Chat,
) -> None:
    turns = [chat.turn(number) for number in range(NUM_TURNS)]

    for before, turn in pairwise(turns):
        assert turn.cached_tokens == len(before.prompt) - 1
        assert turn.num_read == len(turn.prompt) - len(before.prompt) + 1
    assert turns[-1].answer == chat.cold()
    found = list(headers(chat.store))
    rows = [header for header in found if not header.info.is_checkpoint]
    checkpoints = [header for header in found if header.info.is_checkpoint]
    num_tokens = len(turns[-1].prompt) - 1
    assert sum(header.info.end - header.info.start for header in rows) == num_tokens
    assert 2 <= len(checkpoints) <= 12
    assert len({tensor_nbytes(header) for header in checkpoints}) == 1


# Where the next turn parts


def answered(generator: CachedGenerator, prompt: RenderedPrompt, length: int) -> None:
    """Have a prompt answered with so many tokens, and save both."""
    options = {"max_tokens": length, "save": True, "save_answer": True}
    assert len(list(generator.stream_generate(prompt, **options))) == length


def test_saved_answer_keeps_the_place_where_the_next_turn_parts(chat: Chat) -> None:
    """The start of the answer's thinking, two tokens later, does not take its place."""
    prompt = RenderedPrompt(list(range(5, 46)), boundaries=(1, 39))

    answered(chat.generator, prompt, 70)

    other = [*prompt.token_ids[:39], 200, 201, 202]
    assert chat.generator.match(other).cached_tokens == 39


def thinking_templates() -> list[Path]:
    """Return the templates that know of thinking."""
    found = sorted(REAL_TEMPLATES.glob("*.jinja"))
    return [path for path in found if "think" in path.read_text()]


@pytest.mark.skipif(not thinking_templates(), reason="templates are not here")
@pytest.mark.parametrize("template", thinking_templates(), ids=lambda path: path.stem)
def test_next_turn_reuses_up_to_where_the_answer_begins(
    template: Path, tmp_path: Path
) -> None:
    chat = Chat(tmp_path / "chat", template.read_text())
    chance = random.Random(template.stem)
    texts = ["x" * chance.randrange(1, 30) for _ in range(3)]
    # As models leave it after their thinking.
    texts[1] = chance.choice(("", "\n\n")) + texts[1]
    said = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), texts, strict=True)
    ]
    try:
        prompt, other = map(chat.generator.render, (said[:1], said))
    except UsageError as error:
        pytest.skip(str(error))
    shared = shared_tokens(prompt.token_ids, other.token_ids)
    if shared == len(prompt.token_ids):
        pytest.skip("the template keeps the start of the answer")

    # So long that it is about as far from here to the answer as to the head.
    answered(chat.generator, prompt, chance.randrange(64, 80))

    # But for a token that other answers' first one merges with.
    assert chat.generator.match(other).cached_tokens >= shared - 1
