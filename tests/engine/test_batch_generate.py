"""Many prompts at once are answered as one by one, and as mlx-lm does it."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlx_lm.generate import batch_generate

from promptcache import CachedGenerator, UsageError
from tests.helpers.marks import all_but
from tests.helpers.runs import ids
from tests.helpers.tiny import CONFIGS

SYSTEM = ids(90, seed=5)
PROMPTS = [[*SYSTEM, *ids(n, seed=n)] for n in (3, 40, 1, 17, 120, 8)]


@pytest.fixture
def make_generator(
    make_model: Callable[[str], Path], tmp_path: Path
) -> Iterator[Callable[[str], CachedGenerator]]:
    opened: list[CachedGenerator] = []

    def make(name: str = "llama") -> CachedGenerator:
        generator = CachedGenerator.load(
            make_model(name), store=tmp_path / "store", memory_limit=10**8
        )
        opened.append(generator)
        return generator

    yield make
    for generator in opened:
        generator.close()


NAMES = [name for name in CONFIGS if name != "draft"]


@pytest.mark.parametrize("name", all_but(["llama", "gemma3_text", "mamba"], NAMES))
def test_answers_equal_single_ones_and_what_is_shared_is_read_once(
    make_generator: Callable[[str], CachedGenerator], name: str
) -> None:
    generator = make_generator(name)
    prompts = random.Random(1).sample(PROMPTS, len(PROMPTS))

    response = generator.batch_generate(prompts, 20)

    for prompt, text, tokens in zip(
        prompts, response.texts, response.token_ids, strict=True
    ):
        alone = [*generator.stream_generate(prompt, 20, reuse=False, save=False)]
        assert text == "".join(r.text for r in alone)
        assert tokens == [r.token for r in alone if r.finish_reason != "stop"]
    if name != "dynamic":
        # It can be resumed only after whole pieces.
        assert sorted(response.cached_tokens)[1] >= len(SYSTEM)


def test_response_equals_that_of_mlx_lm(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("llama")
    limits = [5, 20, 3, 1, 12, 7]

    response = generator.batch_generate(PROMPTS, limits)

    model, tokenizer = generator.model, generator.tokenizer
    plain = batch_generate(
        model,
        tokenizer,
        PROMPTS,
        max_tokens=limits,
        return_token_ids=True,
        return_logprobs=True,
    )
    # Texts are those of single runs, which are detokenized in another way.
    assert response.token_ids == plain.token_ids
    assert plain.logprobs is not None
    for ours, theirs in zip(response.logprobs, plain.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert response.stats.generation_tokens == plain.stats.generation_tokens


def test_any_form_of_prompt_is_taken(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("llama")
    chat = [{"role": "user", "content": "What is the light for?"}]

    texts = generator.batch_generate(["Once", [1, 2, 3], chat], 8).texts

    expected = [generator.generate(p, max_tokens=8) for p in ("Once", [1, 2, 3], chat)]
    assert texts == expected


def test_wrong_prompt_is_an_error_of_its_own(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("llama")
    prompts = [[1, 2], [], [10**6], [3, 4]]

    results = {r.index: r for r in generator.stream_batch(prompts, 4)}

    assert [type(results[i].error) for i in range(4)] == [
        *(type(None), UsageError, UsageError, type(None)),
    ]
    assert len(results[0].token_ids) == 4
    with pytest.raises(UsageError, match="empty"):
        generator.batch_generate(prompts, 4)


def test_results_come_as_they_are_done(
    make_generator: Callable[[str], CachedGenerator],
) -> None:
    generator = make_generator("llama")
    results = generator.stream_batch([ids(5), ids(5, seed=2)], [60, 2])

    assert next(results).index == 1
    # What is not done is given up.
    results.close()


def test_nothing_is_nothing(make_generator: Callable[[str], CachedGenerator]) -> None:
    generator = make_generator("llama")
    assert generator.batch_generate([]).texts == []
