"""Answers decoded together are those decoded alone, for every architecture."""

from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from promptcache.engine.batch.decode_batch import DecodeBatch, Joining
from promptcache.engine.decode import Decoder
from promptcache.engine.prefill import prefill, read_rest
from promptcache.engine.sampling import greedy
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.length_dependence import batch_dependence
from tests.architectures import architectures
from tests.helpers.marks import all_but

# Windows are 32 tokens wide.
LENGTHS = (20, 31, 33, 100, 300)
NUM_TOKENS = 24
# Mlx-lm's own code fails with two in a batch; the engine then goes on one by one.
FAILING = {"gemma2", "gpt_bigcode", "phi3small"}
SHOWN = [
    *("llama", "gemma3_text", "qwen3_next", "mamba", "gpt_oss", "deepseek_v3"),
    *("gemma3n", "recurrent_gemma", "afm7", "gemma2"),
]
NAMES = architectures.architectures()


def begun(model: Any, token_ids: list[int]) -> tuple[Decoder, list[Any]]:
    """Return what goes on after a prompt, and its cache."""
    cache = make_prompt_cache(model)
    last = len(token_ids) - 1
    prefill(model, cache, token_ids, start=0, end=last)
    logits = read_rest(model, cache, token_ids, num_read=last)
    decoder = Decoder(
        model,
        cache,
        token_ids,
        logits,
        max_tokens=NUM_TOKENS,
        sampler=greedy,
        kv=KVSettings(),
    )
    return decoder, cache


def together(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return what is decoded in one batch, which each joins at another time."""
    batch: DecodeBatch[int] = DecodeBatch(model)
    tokens: list[list[int]] = []

    def step() -> None:
        for member, step in batch.step():
            tokens[member].append(step.token)

    for number, prompt in enumerate(prompts):
        decoder, cache = begun(model, prompt)
        first = next(decoder).token
        tokens.append([first])
        batch.join([Joining(number, cache, prompt, first, greedy)])
        step()
    while len(tokens[-1]) < NUM_TOKENS:
        step()
    return [each[:NUM_TOKENS] for each in tokens]


@pytest.mark.parametrize("name", all_but(SHOWN, NAMES))
def test_batch_equals_single_runs(name: str) -> None:
    try:
        model = architectures.build(name)
    except Exception as error:
        pytest.skip(f"cannot be built: {error}")
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model)):
        return
    numbers = np.random.default_rng(0)
    prompts = [[int(n) for n in numbers.integers(5, 500, k)] for k in LENGTHS]

    if name in FAILING:
        with pytest.raises(ValueError):
            together(model, prompts)
        return
    alone = [[step.token for step in begun(model, p)[0]] for p in prompts]
    is_same = together(model, prompts) == alone

    # Where it is not, nothing is decoded together.
    assert is_same == (batch_dependence(model) is None)
