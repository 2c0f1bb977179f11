"""The examples of the docs do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest

from promptcache import CachedGenerator
from tests.helpers.marks import all_but

NARRATOR = Path(__file__).parents[1] / "docs" / "examples" / "narrator.py"


@pytest.fixture(scope="module")
def narrator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("narrator", NARRATOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_narrator_reads_its_rules_once(
    narrator: ModuleType, generator: CachedGenerator
) -> None:
    game = narrator.GameNarrator(generator)

    cached = [list(game.responses(*turn))[-1].cached_tokens for turn in narrator.TURNS]

    assert game.rules.cached_tokens == 0
    assert game.rules.name == "narrator"
    assert len(cached) == 10
    # Some states begin alike, and share what they share.
    assert all(tokens >= game.rules.num_tokens for tokens in cached)


def test_narrator_says_the_same_at_once_and_as_it_comes(
    narrator: ModuleType, generator: CachedGenerator
) -> None:
    game = narrator.GameNarrator(generator)
    action, location, inventory = narrator.TURNS[0]

    mx.random.seed(3)
    at_once = game.narrate(action, location, inventory)
    mx.random.seed(3)
    pieces = list(game.narrate_stream(action, location, inventory))

    assert len(pieces) > 1
    assert "".join(pieces).strip() == at_once != ""


@pytest.mark.parametrize("num_runs", all_but([1], [1, 2]))
def test_narrator_runs_as_a_script(model_dir: Path, num_runs: int) -> None:
    command = [sys.executable, str(NARRATOR), "--model", str(model_dir)]

    first, *again = (
        subprocess.run(command, capture_output=True, check=True).stdout.decode()
        for _ in range(num_runs)
    )

    assert first.count("first token after") == 10
    assert not first.startswith("0 tokens of rules read")
    assert all(text.startswith("0 tokens of rules read") for text in again)
