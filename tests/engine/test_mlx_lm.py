"""What promptcache uses of mlx-lm's batches, in the form that it needs."""

import inspect
from importlib import import_module
from typing import Any

import pytest

# The package has functions of these names.
generate = import_module("mlx_lm.generate")
sample_utils = import_module("mlx_lm.sample_utils")
PARAMETERS: dict[str, tuple[str, ...]] = {
    "generate.GenerationBatch": (
        *("model", "uids", "inputs", "prompt_cache", "tokens", "samplers"),
        *("fallback_sampler", "logits_processors", "stop_sequences", "max_tokens"),
    ),
    "generate.GenerationBatch.empty": ("model", "fallback_sampler"),
    "generate.GenerationBatch.extend": ("self", "batch"),
    "generate.GenerationBatch.extract_cache": ("self", "idx"),
    "generate.GenerationBatch.filter": ("self", "keep"),
    "generate.GenerationBatch.next": ("self",),
    "generate.StopSequences": ("stop_sequences",),
    "generate.TextStateMachine": ("transitions",),
    "generate.TextStateMachine.split": ("state", "text"),
    "generate.TextStateMachine.flush": ("state",),
    "generate.make_text_state_machine": ("tokenizer", "stop_words"),
    "sample_utils.greedy_sampler": ("logprobs",),
    "sample_utils.make_logits_processors": (
        *("logit_bias", "repetition_penalty", "repetition_context_size"),
        *("presence_penalty", "presence_context_size", "frequency_penalty"),
        "frequency_context_size",
    ),
    "sample_utils.make_sampler": (
        *("temp", "top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability"),
        *("xtc_threshold", "xtc_special_tokens"),
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_mlx_lm_takes_what_it_is_given(name: str) -> None:
    found: Any = {"generate": generate, "sample_utils": sample_utils}
    for part in name.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part, None)
        assert found is not None, f"mlx_lm.{name} is gone"

    taken = tuple(inspect.signature(found).parameters)

    assert taken == PARAMETERS[name], f"mlx_lm.{name} takes other parameters"


def test_responses_have_the_fields_that_are_read() -> None:
    fields = generate.GenerationBatch.Response.__dataclass_fields__

    assert {"token", "logprobs"} <= set(fields)
