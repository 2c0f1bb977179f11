"""Answers match the JSON schema that they are to match, and end there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from promptcache import CachedGenerator, UsageError
from promptcache.server.constraints import Constraints
from tests.helpers.serving import running

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Tell me of Anna, as JSON."}]


@pytest.fixture(scope="module")
def client(model_dir: Path, tmp_path_factory: Any) -> Iterator[openai.OpenAI]:
    with running(model_dir, store=tmp_path_factory.mktemp("s") / "store") as server:
        yield server.client()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_answer_matches_its_schema(
    client: openai.OpenAI, stream: bool, seed: int
) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    arguments: Any = {
        "model": "default_model",
        "messages": QUESTION,
        "response_format": form,
        "max_tokens": 200,
        "temperature": 1.0,
        "seed": seed,
    }
    if stream:
        parts = [*client.chat.completions.create(**arguments, stream=True)]
        choices = [part.choices[0] for part in parts]
        text = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        [choice] = client.chat.completions.create(**arguments).choices
        text, reason = choice.message.content or "", choice.finish_reason

    # A random model chooses whatever it may.
    person = json.loads(text)
    assert reason == "stop"
    assert set(person) == {"name", "age"}
    assert len(person["name"]) <= 12 and 0 <= person["age"] <= 150


def test_any_object_is_json(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default_model",
        messages=QUESTION,  # type: ignore[arg-type]
        response_format={"type": "json_object"},
        max_tokens=40,
        temperature=1.0,
        seed=3,
    )

    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "p", "schema": {"type": "nothing"}},
    }
    with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
        client.chat.completions.create(
            model="default_model",
            messages=QUESTION,  # type: ignore[arg-type]
            response_format=form,
        )


def test_reasoning_before_the_answer_is_free(model_dir: Path, tmp_path: Path) -> None:
    generator = CachedGenerator.load(model_dir, store=tmp_path / "store")
    ends = generator.tokenizer.encode("###", add_special_tokens=False)
    generator.tokenizer._think_end_tokens = tuple(ends)
    constraints = Constraints(generator.tokenizer, generator.loaded.vocab_size)
    process = constraints.of_schema(PERSON, is_thinking=True)
    import mlx.core as mx

    logits = mx.zeros((1, generator.loaded.vocab_size))
    seen = [1, 2, 3]

    def num_allowed() -> int:
        return int((process(mx.array(seen), logits) > -1).sum().item())

    assert num_allowed() == logits.shape[1]
    seen += [7, *ends[:-1]]
    assert num_allowed() == logits.shape[1]
    seen.append(ends[-1])
    assert num_allowed() < 10
    generator.close()


def test_no_schema_at_all_is_refused(model_dir: Path, tmp_path: Path) -> None:
    generator = CachedGenerator.load(model_dir, store=tmp_path / "store")
    constraints = Constraints(generator.tokenizer, generator.loaded.vocab_size)

    with pytest.raises(UsageError, match="cannot be enforced"):
        constraints.of_schema({"type": 7}, is_thinking=False)
    generator.close()
