"""The hot tier: the longest prefix in memory, right to the last logit."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from promptcache import CachedGenerator, PrefixStore
from promptcache.tiers.memory_tier import MemoryTier
from tests.architectures import architectures
from tests.architectures.conformance import CountingModel
from tests.helpers import tiny
from tests.helpers.memory import MODEL, PLENTY, ids, read, rows


def put(tier: MemoryTier, token_ids: list[int]) -> None:
    tier.insert("f", token_ids, read(token_ids)[0])


def taken(tier: MemoryTier, prompt: list[int]) -> tuple[int, list[Any]]:
    """Take what there is of a prompt, and check that it is what a cold run computes."""
    found = tier.find("f", prompt, lambda position: position)
    if found is None:
        return 0, make_prompt_cache(MODEL)
    cache = tier.pop(found)
    assert cache is not None
    expected, _ = read(prompt[: found.num_tokens])
    for left, right in zip(rows(cache), rows(expected), strict=True):
        assert mx.allclose(left, right, atol=1e-5).item()
    return found.num_tokens, cache


def test_prompt_that_continues_gets_the_very_arrays() -> None:
    tier = MemoryTier(PLENTY)
    prompt = ids(300, 1)
    cache, _ = read(prompt)
    before = cache[0].keys

    tier.insert("f", prompt, cache)
    num_tokens, again = taken(tier, [*prompt, 5])

    assert num_tokens == 300
    assert again[0].keys is before
    assert len(tier) == 0


def test_at_least_one_token_is_left_to_read() -> None:
    tier = MemoryTier(PLENTY)
    put(tier, ids(50, 1))

    assert taken(tier, ids(50, 1))[0] == 49


def test_other_fingerprint_finds_nothing() -> None:
    tier = MemoryTier(PLENTY)
    put(tier, ids(50, 1))

    assert tier.find("g", [*ids(50, 1), 1], lambda position: position) is None


def test_first_question_survives_the_second_one() -> None:
    tier = MemoryTier(PLENTY)
    system, one, two = ids(200, 1), ids(30, 2), ids(40, 3)
    put(tier, [*system, *one])

    num_tokens, cache = taken(tier, [*system, *two])
    assert num_tokens == 200
    tier.insert("f", [*system, *two], read([*system, *two], cache)[0])

    assert taken(tier, [*system, *one, 5])[0] == 230


def test_short_shared_part_of_a_long_prompt_is_copied() -> None:
    tier = MemoryTier(PLENTY)
    system, long = ids(40, 1), ids(300, 2)
    put(tier, [*system, *long])

    num_tokens, cache = taken(tier, [*system, *ids(10, 3)])
    read([*system, *ids(10, 3)], cache)

    assert num_tokens == 40
    assert taken(tier, [*system, *long, 5])[0] == 340


@pytest.mark.parametrize("seed", range(6))
def test_conversations_in_turn_equal_cold_runs(seed: int) -> None:
    """Prompts fork and go on at random; nothing is ever lost while there is room."""
    random_ = random.Random(seed)
    tier = MemoryTier(PLENTY)
    known: list[list[int]] = []
    for step in range(40):
        base = random_.choice(known) if known else []
        kept = random_.choice([len(base), random_.randrange(len(base) + 1)])
        prompt = [*base[:kept], *ids(random_.randrange(1, 60), 1000 * seed + step)]
        shared = max((_common(prompt, other) for other in known), default=0)

        num_tokens, cache = taken(tier, prompt)
        cache, logits = read(prompt, cache)

        assert num_tokens == min(shared, len(prompt) - 1)
        assert mx.allclose(logits, read(prompt)[1], atol=1e-4).item()
        tier.insert("f", prompt, cache)
        known.append(prompt)


def _common(left: list[int], right: list[int]) -> int:
    pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(left, right, strict=False))
    return sum(1 for _ in pairs)


def test_limit_holds_and_the_least_recently_used_goes_first() -> None:
    one, two, three = ids(200, 1), ids(200, 2), ids(200, 3)
    size = sum(layer.nbytes for layer in read(one)[0])
    tier = MemoryTier(2 * size)
    for prompt in (one, two):
        put(tier, prompt)
    num_tokens, cache = taken(tier, [*one, 5])
    assert num_tokens == 200
    tier.insert("f", one, cache)

    put(tier, three)

    assert tier.nbytes <= tier.max_nbytes
    found = [taken(tier, [*prompt, 5])[0] for prompt in (one, two, three)]
    assert found == [200, 0, 200]


def test_nothing_is_kept_without_room() -> None:
    tier = MemoryTier(0)
    put(tier, ids(50, 1))

    assert len(tier) == 0


def test_cache_that_has_read_more_is_cut_to_what_is_known() -> None:
    tier = MemoryTier(PLENTY)
    prompt = ids(60, 1)

    tier.insert("f", prompt, read(prompt)[0], good_to=50)

    assert taken(tier, [*prompt[:50], 7, 7])[0] == 50


def test_what_another_thread_has_taken_is_gone() -> None:
    tier = MemoryTier(PLENTY)
    prompt = ids(50, 1)
    put(tier, prompt)
    found = tier.find("f", [*prompt, 1], lambda position: position)
    assert found is not None
    tier.clear()

    assert tier.pop(found) is None


def test_window_that_has_read_more_than_is_known_is_not_kept() -> None:
    tier = MemoryTier(PLENTY)
    prompt = ids(60, 1)
    cache = [RotatingKVCache(32) for _ in make_prompt_cache(MODEL)]
    MODEL(mx.array(prompt)[None], cache=cache)

    tier.insert("f", prompt, cache, good_to=50)

    assert len(tier) == 0


# Through the generator


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[CountingModel, CachedGenerator]]:
    """A generator whose model counts the tokens that it reads."""
    yield from _generator("llama", tmp_path)


def _generator(
    name: str, folder: Path
) -> Iterator[tuple[CountingModel, CachedGenerator]]:
    model = architectures.build(name)
    counting = CountingModel(model)
    tokenizer_folder = folder / "tokenizer"
    tokenizer_folder.mkdir()
    tiny.save_tokenizer(tokenizer_folder, tiny.CHAT_TEMPLATE)
    from mlx_lm.utils import load_tokenizer

    with CachedGenerator(
        counting,
        load_tokenizer(tokenizer_folder),
        store=folder / "store",
        memory_limit=PLENTY,
    ) as generator:
        generator.tokenizer.eos_token_ids = set()
        yield counting, generator


def answered(generator: CachedGenerator, prompt: list[int], **options: Any) -> Any:
    responses = list(generator.stream_generate(prompt, 8, **options))
    return [r.token for r in responses], responses[-1]


def cold(generator: CachedGenerator, prompt: list[int]) -> list[int]:
    return answered(generator, prompt, reuse=False, save=False)[0]


def test_second_request_reads_only_what_is_new(
    counted: tuple[CountingModel, CachedGenerator],
) -> None:
    model, generator = counted
    system = ids(300, 1)
    first, _ = answered(generator, [*system, 1, 2, 3], save=False)

    before = model.num_read
    tokens, last = answered(generator, [*system, 4, 5], save=False)

    assert last.cached_tokens == 300
    assert model.num_read - before == 2 + 7
    assert tokens == cold(generator, [*system, 4, 5])
    assert generator.store is not None
    assert generator.store.prefixes() == []
    again, last = answered(generator, [*system, 1, 2, 3], save=False)
    assert again == first
    assert last.cached_tokens == 302


def test_turn_after_an_answer_reads_only_the_turn(
    counted: tuple[CountingModel, CachedGenerator],
) -> None:
    _, generator = counted
    prompt = ids(100, 1)
    answer, _ = answered(generator, prompt, save=False)

    turn = [*prompt, *answer, 9, 9]
    tokens, last = answered(generator, turn, save=False)

    # The last token of an answer is never read.
    assert last.cached_tokens == 107
    assert tokens == cold(generator, turn)


@pytest.mark.parametrize("num_taken", [1, 3])
def test_generation_that_is_closed_early_stays_in_memory(
    counted: tuple[CountingModel, CachedGenerator], num_taken: int
) -> None:
    _, generator = counted
    prompt = ids(100, 1)
    stream = generator.stream_generate(prompt, 8, save=False)
    answer = [next(stream).token for _ in range(num_taken)]
    stream.close()

    turn = [*prompt, *answer, 9]
    tokens, last = answered(generator, turn, save=False)

    assert last.cached_tokens >= 100
    assert tokens == cold(generator, turn)


def test_two_generations_at_once_do_not_disturb_each_other(
    counted: tuple[CountingModel, CachedGenerator],
) -> None:
    _, generator = counted
    system = ids(120, 1)
    answered(generator, system, save=False)
    prompts = [[*system, 1, seed] for seed in (7, 8)]
    expected = [cold(generator, prompt) for prompt in prompts]

    streams = [generator.stream_generate(p, 8, save=False) for p in prompts]
    steps = list(zip(*streams, strict=True))

    found = [[r.token for r in column] for column in zip(*steps, strict=True)]
    assert found == expected


def test_what_memory_spared_is_saved_once_it_is_due(
    counted: tuple[CountingModel, CachedGenerator],
) -> None:
    """Turns of 200 tokens: none is worth saving alone, all together are."""
    _, generator = counted
    assert generator.store is not None
    prompt: list[int] = []
    stored = []
    for turn in range(6):
        prompt = [*prompt, *ids(200, turn)]
        answer, last = answered(generator, prompt)
        assert last.cached_tokens >= max(len(prompt) - 201, 0)
        stored.append(
            max((p.num_tokens for p in generator.store.prefixes()), default=0)
        )
        prompt += answer

    assert stored[1] == 0
    assert stored[2] == 616
    assert generator.store.verify().is_sound
    with PrefixStore(generator.store.path) as store:
        fingerprint = generator.fingerprint()
        assert store.lookup(prompt, fingerprint).cached_tokens == stored[-1]


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next"])
def test_other_caches_are_continued_as_a_whole(name: str, tmp_path: Path) -> None:
    for _, generator in _generator(name, tmp_path):
        prompt = ids(100, 1)
        answer, _ = answered(generator, prompt, save=False)

        turn = [*prompt, *answer[:7], 9, 9]
        tokens, last = answered(generator, turn, save=False)
        assert last.cached_tokens == 107
        assert tokens == cold(generator, turn)

        fork = [*prompt, 3, 3]
        tokens, last = answered(generator, fork, save=False)
        assert last.cached_tokens == 0
        assert tokens == cold(generator, fork)


def test_save_of_windows_is_not_lost_for_the_sake_of_memory(tmp_path: Path) -> None:
    for _, generator in _generator("gemma3_text", tmp_path):
        prompt = ids(100, 1)
        answer, _ = answered(generator, prompt, save=False)

        turn = [*prompt, *answer, 9, 9]
        _, last = answered(generator, turn, save=True)

        assert last.cached_tokens == 0
        assert last.key is not None


@pytest.mark.parametrize("exact", [True, False])
def test_exact_mode_takes_over_only_at_whole_pieces(
    counted: tuple[CountingModel, CachedGenerator], exact: bool
) -> None:
    _, generator = counted
    options = {"exact": exact, "prefill_step_size": 32, "save": False}
    prompt = ids(100, 1)
    answered(generator, prompt, **options)

    _, last = answered(generator, [*prompt[:90], 1, 2], **options)

    assert last.cached_tokens == (64 if exact else 90)


def test_quantized_caches_are_left_to_the_disk(
    counted: tuple[CountingModel, CachedGenerator],
) -> None:
    _, generator = counted
    options = {"kv_bits": 8, "kv_group_size": 32, "save": False}
    answered(generator, ids(100, 1), **options)

    assert len(generator._memory) == 0


def test_longer_prefix_on_disk_is_preferred(
    counted: tuple[CountingModel, CachedGenerator],
) -> None:
    _, generator = counted
    prompt = ids(200, 1)
    generator.build(prompt)
    answered(generator, [*prompt[:100], 1], save=False)

    tokens, last = answered(generator, [*prompt, 2, 3], save=False)

    assert last.cached_tokens == 200
    assert tokens == cold(generator, [*prompt, 2, 3])


def test_memory_counts_as_a_hit(
    counted: tuple[CountingModel, CachedGenerator],
) -> None:
    _, generator = counted
    assert generator.store is not None
    for _ in range(2):
        answered(generator, ids(100, 1), save=False)

    usage = {u.key: u.requests for u in generator.store.usage()}
    assert usage == {None: 1, "memory": 1}


def test_default_limit_is_a_part_of_the_memory(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMPTCACHE_MEMORY_LIMIT")
    with CachedGenerator.load(model_dir) as generator:
        assert generator._memory.max_nbytes > 10**8
    monkeypatch.setenv("PROMPTCACHE_MEMORY_LIMIT", "5MB")
    with CachedGenerator.load(model_dir) as generator:
        assert generator._memory.max_nbytes == 5 * 10**6


@pytest.mark.parametrize(
    "options", [{"max_kv_size": 48}, {"max_kv_size": 48, "exact": True}]
)
def test_windows_that_drop_rows_equal_cold_runs(
    counted: tuple[CountingModel, CachedGenerator], options: dict[str, Any]
) -> None:
    _, generator = counted
    options = {**options, "prefill_step_size": 32}
    prompt = ids(100, 1)
    for turn in range(4):
        answer, _ = answered(generator, prompt, save=False, **options)
        assert (
            answer == answered(generator, prompt, reuse=False, save=False, **options)[0]
        )
        prompt = [*prompt, *answer[:7], *ids(5 + turn, turn)]
