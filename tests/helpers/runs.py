"""Generations of tiny models, cold and warm, and how they compare."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning
from promptcache.store.blobs.folder import BlobFolder

MAX_TOKENS = 24


def ids(num_tokens: int, *, seed: int = 1) -> list[int]:
    """Return random token ids."""
    key = mx.random.key(seed)
    tokens: list[int] = mx.random.randint(0, 256, (num_tokens,), key=key).tolist()
    return tokens


PROMPT = ids(100)
OTHER = ids(100, seed=2)
QUANTIZED = [
    pytest.param(
        {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start},
        id=f"{bits} bits from {start}",
    )
    for bits in (8, 4)
    for start in (0, 60)
]


class Run(NamedTuple):
    """What a generation gave."""

    tokens: list[int]
    text: str
    logprobs: list[mx.array]
    last: Any


def collected(responses: Iterator[Any]) -> Run:
    taken = list(responses)
    tokens = [response.token for response in taken]
    text = "".join(response.text for response in taken)
    return Run(tokens, text, [response.logprobs for response in taken], taken[-1])


def cold(generator: CachedGenerator, prompt: Any, **options: Any) -> Run:
    """Run without the store."""
    options = {"max_tokens": MAX_TOKENS, **options}
    return collected(
        generator.stream_generate(prompt, reuse=False, save=False, **options)
    )


def run(generator: CachedGenerator, prompt: Any, **options: Any) -> Run:
    """Run with the store, saving nothing unless asked for."""
    options = {"max_tokens": MAX_TOKENS, "save": False, **options}
    return collected(generator.stream_generate(prompt, **options))


def largest_difference(left: list[mx.array], right: list[mx.array]) -> float:
    pairs = zip(left, right, strict=True)
    return max(float(mx.abs(a - b).max()) for a, b in pairs)


def stored_token_ids(store: PrefixStore) -> list[list[int]]:
    """Return what prefixes the store lists, and check that it holds no more."""
    reports = [store.report(prefix.key) for prefix in store.prefixes()]
    listed = {segment.key for report in reports for segment in report.segments}
    assert {key for key, _ in BlobFolder(store.path).stored()} == listed
    for report in reports:
        assert report.segments[-1].end == len(report.token_ids)
    return sorted(list(report.token_ids) for report in reports)


def only_warning(record: pytest.WarningsRecorder) -> str:
    """Return the text of the one warning of promptcache there is."""
    found = [w for w in record if issubclass(w.category, PromptCacheWarning)]
    assert len(found) == 1
    return str(found[0].message)


def plain(generator: CachedGenerator, prompt: Any, **options: Any) -> Run:
    """Run plain mlx-lm."""
    options = {"max_tokens": MAX_TOKENS, **options}
    return collected(
        mlx_lm.stream_generate(
            generator.model, generator.tokenizer, prompt=prompt, **options
        )
    )
