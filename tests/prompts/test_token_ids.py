"""Token ids: of every kind that people have them, and none that a model does not."""

from array import array
from collections import UserDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from promptcache import PrefixStore, UsageError
from promptcache.generator import CachedGenerator
from tests.helpers import tiny
from tests.helpers.commands import assert_fails, invoke

IDS = [5, 200, 7, 263]
# The tiny models'. Their tokenizers have fewer.
VOCAB_SIZE = 512


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        array("I", IDS),
        iter(IDS),
        [*map(np.int64, IDS)],
        [*map(np.uint32, IDS)],
        np.array(IDS),
        np.array([IDS]),
        mx.array(IDS),
        mx.array([IDS]),
        [*mx.array(IDS)],
        {"input_ids": IDS},
        UserDict({"input_ids": np.array([IDS]), "attention_mask": [1] * 4}),
    ],
    ids=lambda prompt: f"{type(prompt).__name__}-{str(prompt)[:20]}",
)
def test_token_ids_of_every_kind_are_taken(
    generator: CachedGenerator, prompt: Any
) -> None:
    rendered = generator.render(prompt)

    assert rendered.token_ids == IDS
    assert {*map(type, rendered.token_ids)} == {int}


def test_what_tokenizers_return_is_taken(generator: CachedGenerator) -> None:
    tokenizer = generator.tokenizer._tokenizer
    messages = [{"role": "user", "content": "Hello"}]
    encoded = tokenizer("Hello")
    chat = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )

    assert generator.generate(encoded, max_tokens=4) == generator.generate(
        "Hello", max_tokens=4
    )
    assert generator.render(chat).token_ids == generator.render(messages).token_ids


WRONG = [
    (None, "not NoneType"),
    (5, "not int"),
    (b"text", "not bytes"),
    ({"ids": IDS}, "not dict"),
    ({1, 2}, "not set"),
    ([1, 2.0], "not float such as 2.0"),
    (np.array([1.5]), "not float"),
    ([True, False], "not bool"),
    (np.array([True]), "not bool"),
    ([np.bool_(True)], "not bool"),
    ([1, None], "not NoneType"),
    ([IDS, IDS], "not list"),
    (["a", "b"], "not str"),
    ([], "empty"),
    (mx.array([], dtype=mx.int32), "empty"),
    ([1, -1], "-1 is not in the vocabulary"),
    ([1, VOCAB_SIZE], "512 is not in the vocabulary of the model, [0, 512)"),
    ([2**31 + 5], "vocabulary"),
    ([2**32 + 5, 1], "vocabulary"),
    ([10**30], "vocabulary"),
    ([np.int64(-(2**40))], "vocabulary"),
]


@pytest.mark.parametrize(
    "job", ["generate", "stream_generate", "match", "explain", "build"]
)
def test_what_is_no_prompt_is_one_line_before_anything_is_done(
    generator: CachedGenerator, job: str
) -> None:
    for prompt, words in WRONG:
        if job == "build" and prompt is None:
            words = "nothing to build"
        with pytest.raises(UsageError) as error:
            getattr(generator, job)(prompt)

        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert generator.store is not None
    assert generator.store.prefixes() == []


def test_the_last_token_of_the_vocabulary_is_taken(generator: CachedGenerator) -> None:
    assert list(generator.stream_generate([1, VOCAB_SIZE - 1], max_tokens=1))


@pytest.mark.parametrize("job", ["stream_generate", "build"])
def test_draft_models_need_every_token_too(
    generator: CachedGenerator, tmp_path: Path, job: str
) -> None:
    draft = CachedGenerator.load(
        tiny.save_model(tmp_path / "draft", {**tiny.LLAMA, "vocab_size": 300}),
        store=generator.store,
    ).model

    with pytest.raises(UsageError, match=r"301 is not in .* \[0, 300\)"):
        getattr(generator, job)([1, 301], draft_model=draft)


def test_text_whose_tokens_the_model_has_not_is_one_line(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "small", {**tiny.LLAMA, "vocab_size": 260})

    result = invoke("generate", "-m", model, "Hello")

    assert_fails(result, 2, "is not in the vocabulary of the model, [0, 260)")


def test_quantized_models_know_their_vocabulary(generator: CachedGenerator) -> None:
    import mlx.nn as nn

    nn.quantize(generator.model, group_size=32, bits=4)

    with pytest.raises(UsageError, match=r"512 is not in .* \[0, 512\)"):
        generator.generate([VOCAB_SIZE])


@pytest.mark.parametrize("token_ids", [[-1], [2**32], [1.5], ["a"]])
def test_a_store_refuses_what_is_no_token_id(
    store: PrefixStore, generator: CachedGenerator, token_ids: Any
) -> None:
    with pytest.raises(UsageError, match="integers in"):
        store.lookup(token_ids, generator.fingerprint())
