"""What a generator refuses, and how it shares a store."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import KVCache

from promptcache import (
    CachedGenerator,
    PrefixStore,
    PromptCacheWarning,
    UnsupportedCacheError,
    UsageError,
)
from tests.helpers import tiny
from tests.helpers.runs import OTHER, PROMPT, only_warning, plain, run


class UnknownCache(KVCache):
    """A cache class that neither mlx-lm nor the model defines."""


@pytest.fixture
def unsupported(
    model_dir: Path, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> CachedGenerator:
    """A generator whose model makes a cache of an unknown class."""
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    monkeypatch.setattr(
        type(model), "make_cache", lambda model: [KVCache(), UnknownCache()]
    )
    return CachedGenerator(model, tokenizer, store=store)


def test_unsupported_cache_class_is_one_warning_and_a_plain_run(
    unsupported: CachedGenerator, store: PrefixStore
) -> None:
    with pytest.warns(PromptCacheWarning) as record:
        tokens = run(unsupported, PROMPT, save=True).tokens

    assert "UnknownCache" in only_warning(record)
    assert tokens == plain(unsupported, PROMPT).tokens
    assert store.prefixes() == []


def test_unsupported_cache_class_is_refused_before_any_prefill(
    unsupported: CachedGenerator,
) -> None:
    calls: list[object] = []

    with pytest.raises(UnsupportedCacheError, match="UnknownCache"):
        unsupported.build(PROMPT, prompt_progress_callback=lambda *a: calls.append(a))

    assert calls == []


def test_input_embeddings_are_one_warning_and_a_plain_run(
    generator: CachedGenerator,
) -> None:
    embeddings = generator.model.model.embed_tokens(mx.array(OTHER))
    generator.build(PROMPT)

    with pytest.warns(PromptCacheWarning) as record:
        found = run(generator, PROMPT, input_embeddings=embeddings, save=True)

    assert "input_embeddings" in only_warning(record)
    expected = plain(generator, PROMPT, input_embeddings=embeddings)
    assert found.tokens == expected.tokens
    assert found.tokens != plain(generator, PROMPT).tokens


def test_max_tokens_of_zero_is_refused(generator: CachedGenerator) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        generator.stream_generate(PROMPT, 0)


@pytest.mark.parametrize("name", ["max_token", "prompt_cache", "prompt_cach"])
def test_unknown_argument_is_refused_as_python_does(
    generator: CachedGenerator, name: str
) -> None:
    options: dict[str, Any] = {name: 3}

    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        generator.stream_generate(PROMPT, **options)


@pytest.mark.parametrize("prompt", ["", [], [{"content": "no role"}]], ids=str)
def test_prompt_that_is_none_is_refused_at_once(
    generator: CachedGenerator, prompt: Any
) -> None:
    with pytest.raises(UsageError):
        generator.stream_generate(prompt)


def test_two_generators_share_one_store(model_dir: Path, store: PrefixStore) -> None:
    with CachedGenerator.load(model_dir, store=store) as first:
        first.build(PROMPT)
    second = CachedGenerator.load(model_dir, store=store)

    answered = run(second, PROMPT)

    assert answered.last.cached_tokens == 99
    assert [prefix.hits for prefix in store.prefixes()] == [1]


def test_another_model_finds_nothing(
    generator: CachedGenerator, store: PrefixStore, tmp_path: Path
) -> None:
    generator.build(PROMPT)
    folder = tiny.save_model(tmp_path / "other", tiny.LLAMA, seed=5)
    other = CachedGenerator.load(folder, store=store)

    answered = run(other, PROMPT)

    assert answered.last.cached_tokens == 0
    assert answered.tokens == plain(other, PROMPT).tokens


def test_namespaces_do_not_share(model_dir: Path, store: PrefixStore) -> None:
    left = CachedGenerator.load(model_dir, store=store, namespace="left")
    right = CachedGenerator.load(model_dir, store=store, namespace="right")

    left.build(PROMPT)

    assert run(left, PROMPT).last.cached_tokens == 99
    assert run(right, PROMPT).last.cached_tokens == 0


def test_context_manager_closes_the_store_it_opened(
    model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own"

    with CachedGenerator.load(model_dir, store=path) as generator:
        generator.build(PROMPT)
        assert (path / "index.db-wal").exists()

    assert not (path / "index.db-wal").exists()
    assert generator.store is None
    generator.close()


def test_context_manager_leaves_a_store_that_was_handed_in_open(
    model_dir: Path, store: PrefixStore
) -> None:
    with CachedGenerator.load(model_dir, store=store) as generator:
        generator.build(PROMPT)

    assert len(store.prefixes()) == 1
