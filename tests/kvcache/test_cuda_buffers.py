"""Rows that go through the ring of slots are those that were written.

The copies to a GPU are plain MLX operations, so that all but their speed shows on any
backend.
"""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from promptcache import CachedGenerator, PromptCacheWarning
from promptcache.kvcache.loading import cuda_buffers
from promptcache.kvcache.loading.cuda_buffers import CudaRowBuffers, make_buffers
from promptcache.kvcache.loading.row_buffers import RowBuffers
from promptcache.tiers import disk_tier
from tests.architectures import architectures
from tests.helpers import tiny

PROMPT = [(13 * i) % 90 for i in range(400)]


@pytest.fixture(autouse=True, params=[1 << 26, 1 << 14], ids=["roomy", "narrow"])
def ring(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[CudaRowBuffers]]:
    """Let all rows go through a ring, in one case of less than one segment."""
    used: list[CudaRowBuffers] = []

    def make(parts: Mapping[str, Any], room: int) -> RowBuffers:
        used.append(CudaRowBuffers(parts, room))
        return used[-1]

    cuda_buffers._ring.cache_clear()
    monkeypatch.setattr(cuda_buffers, "STAGING_NBYTES", request.param)
    monkeypatch.setattr(disk_tier, "make_buffers", make)
    yield used
    cuda_buffers._ring.cache_clear()
    assert cuda_buffers._loading.acquire(blocking=False)
    cuda_buffers._loading.release()


def generator_of(name: str, folder: Path, *, must_exist: bool = False) -> Any:
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        tokenizer.mkdir()
        tiny.save_tokenizer(tokenizer, tiny.CHAT_TEMPLATE)
    mx.random.seed(0)
    model = architectures.build(name)
    found = CachedGenerator(model, load_tokenizer(tokenizer), store=folder / "store")
    found.tokenizer.eos_token_ids = set()
    return found


def answered(generator: CachedGenerator, prompt: list[int], **options: Any) -> Any:
    responses = list(generator.stream_generate(prompt, 12, **options))
    logprobs = mx.stack([response.logprobs for response in responses])
    return [r.token for r in responses], logprobs, responses[-1]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "mamba2"])
def test_what_comes_through_the_ring_equals_a_cold_run(
    name: str, tmp_path: Path, ring: list[CudaRowBuffers]
) -> None:
    with generator_of(name, tmp_path) as generator:
        # Several segments, the last of which is cut.
        for end in (70, 150, 151, 300):
            generator.build(PROMPT[:end], prefill_step_size=64)
        cold, expected, _ = answered(generator, PROMPT[:320], reuse=False, save=False)

        tokens, logprobs, last = answered(generator, PROMPT[:320], save=False)

        assert ring
        # A state is taken before the last token, which is read alone.
        has_states = name in ("qwen3_next", "mamba2")
        assert last.cached_tokens == 300 - has_states
        assert tokens == cold
        assert mx.allclose(logprobs, expected, atol=1e-4).item()


def test_segment_that_is_cut_comes_back(tmp_path: Path) -> None:
    with generator_of("llama", tmp_path) as generator:
        generator.build(PROMPT)
        prompt = [*PROMPT[:333], 1, 2, 3]
        cold, _, _ = answered(generator, prompt, reuse=False, save=False)

        tokens, _, last = answered(generator, prompt, save=False)

        assert last.cached_tokens == 333
        assert tokens == cold


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_one_warning_and_nothing_hangs(tmp_path: Path, damage: str) -> None:
    with generator_of("llama", tmp_path) as generator:
        for end in (100, 200, 300):
            generator.build(PROMPT[:end])
        found = generator.store.lookup(PROMPT[:300], generator.fingerprint())
        path, header = generator.store.segments.open_blob(found.slices[1])
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[header.data_start + 5000] ^= 1
            path.write_bytes(data)
        elif damage == "truncate":
            path.write_bytes(data[:-1000])
        else:
            path.unlink()
        cold, _, _ = answered(generator, PROMPT, reuse=False, save=False)

        with pytest.warns(PromptCacheWarning, match="cannot be used") as record:
            tokens, _, last = answered(generator, PROMPT, save=False)

        assert len(record) == 1
        assert last.cached_tokens == 100
        assert tokens == cold


def test_two_threads_load_one_after_the_other(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with generator_of("llama", tmp_path / name) as generator:
            generator.build(PROMPT)
    found: dict[str, int] = {}

    def load(name: str) -> None:
        with generator_of("llama", tmp_path / name) as generator:
            _, _, last = answered(generator, [*PROMPT, 1], save=False)
            found[name] = last.cached_tokens

    threads = [threading.Thread(target=load, args=[n]) for n in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert found == {"one": 400, "two": 400}


def test_cpu_backend_reads_in_place() -> None:
    assert type(make_buffers({}, 10)) is RowBuffers
