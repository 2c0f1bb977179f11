"""Real conversations, turn by turn: all that was said before is reused, once stored."""

import shutil
from pathlib import Path

import pytest
import tiny
from mlx_lm.utils import load_tokenizer

from benchmarks import replay
from benchmarks.conformance import CountingModel
from promptcache import CachedGenerator, PrefixStore
from promptcache.models.default.download import ensure_default_model

TAU_BENCH = (
    Path(__file__).parents[2] / "shared" / "data" / "tau-bench" / "gpt-4o-airline.json"
)
NUM_CONVERSATIONS = 20

pytestmark = pytest.mark.skipif(
    not TAU_BENCH.exists(), reason="the conversations are not here"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer and template with a tiny model of its vocabulary."""
    folder = tmp_path_factory.mktemp("smollm2")
    config = {**tiny.LLAMA, "vocab_size": 49152, "hidden_size": 16, "head_dim": 8}
    tiny.save_model(folder, config)
    for path in ensure_default_model().glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_every_turn_reuses_all_that_was_said_before(
    model_dir: Path, store: PrefixStore
) -> None:
    loaded = CachedGenerator.load(model_dir, save=False, reuse=False)
    model = CountingModel(loaded.model)
    generator = CachedGenerator(
        model, load_tokenizer(model_dir), store=store, identity=loaded.identity
    )
    said = replay.conversations(TAU_BENCH, NUM_CONVERSATIONS)
    oracle = replay.Oracle()
    num_turns = 0

    for turn in replay.replay(generator, said, oracle):
        read, model.num_read = model.num_read, 0
        assert turn.cached_tokens == turn.shared_tokens, turn
        assert read == turn.prompt_tokens - turn.shared_tokens, turn
        num_turns += 1

    assert {m["role"] for c in said for m in c} == {
        "system",
        "user",
        "assistant",
        "tool",
    }
    assert num_turns >= 10 * NUM_CONVERSATIONS
    # The system prompt, which all begin with, is stored once, like all else.
    assert replay.stored_tokens(generator) == oracle.num_distinct
