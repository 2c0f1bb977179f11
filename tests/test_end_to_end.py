"""The main job with the embedded default model, a real instruct model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from promptcache import CachedGenerator
from promptcache.models.default.download import ensure_default_model
from promptcache.prompts.parts import compose

NARRATOR = Path(__file__).parents[1] / "docs" / "examples" / "narrator.txt"
# Enough for a warm start to be worth it, and read in a few seconds.
SYSTEM = "\n".join(NARRATOR.read_text().splitlines()[:20])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> CachedGenerator:
    ensure_default_model()
    store = tmp_path_factory.mktemp("smollm2")
    return CachedGenerator.load(store=store, save=False, memory_limit=0)


def answer(generator: CachedGenerator, text: str, **options: Any) -> list[Any]:
    messages = compose(system=SYSTEM, user=text)
    return list(generator.stream_generate(messages, max_tokens=12, **options))


@pytest.mark.alone
def test_default_model_starts_warm_in_a_third_of_the_time(
    smollm2: CachedGenerator,
) -> None:
    prefix = smollm2.build(system=SYSTEM)

    cold = answer(smollm2, "I open the door", reuse=False)
    warm = answer(smollm2, "I open the door")

    assert prefix.num_tokens > 300
    assert [r.token for r in warm] == [r.token for r in cold]
    assert warm[-1].ttft_seconds < cold[-1].ttft_seconds / 3


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"temp": 0.8, "seed": 7},
        {"repetition_penalty": 1.3},
        {"kv_bits": 8},
        {"kv_bits": 8, "quantized_kv_start": 0},
    ],
    ids=str,
)
def test_default_model_answers_warm_as_cold(
    smollm2: CachedGenerator, options: dict[str, Any]
) -> None:
    kv = {name: value for name, value in options.items() if "kv" in name}
    prefix = smollm2.build(system=SYSTEM, **kv)

    cold = answer(smollm2, "I open the door", reuse=False, **options)
    warm = answer(smollm2, "I open the door", **options)

    assert cold[-1].cached_tokens == 0
    assert warm[-1].cached_tokens == prefix.num_tokens
    assert [r.token for r in warm] == [r.token for r in cold]


def test_command_without_a_model_takes_the_default_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "promptcache_cli", "generate", "--json"]

    done = subprocess.run(
        [*command, "--store", str(tmp_path), "--max-tokens", "8", "Name a colour"],
        capture_output=True,
        text=True,
        check=True,
    )

    result = json.loads(done.stdout)
    assert result["text"].isprintable()
    assert len(result["token_ids"]) == result["generation_tokens"] > 0


def test_second_system_prompt_stores_only_its_own_part(model_dir: Path) -> None:
    generator = CachedGenerator.load(model_dir)
    assert generator.store is not None
    shared = [i % 250 for i in range(700)]
    first = generator.build([*shared, *range(300)])
    before = blob_nbytes(generator)

    second = generator.build([*shared, *range(5, 305)])

    # 2 layers, keys and values, 2 heads, 32 values of 4 bytes; and 4 bytes a token.
    row = 2 * 2 * 2 * 32 * 4 + 4
    added = blob_nbytes(generator) - before
    assert (first.cached_tokens, second.cached_tokens) == (0, 700)
    assert 300 * row < added < 300 * row + 4096


def blob_nbytes(generator: CachedGenerator) -> int:
    assert generator.store is not None
    blobs = generator.store.path.glob("blobs/*/*")
    return sum(path.stat().st_size for path in blobs)
