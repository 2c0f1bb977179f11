"""The hot tier among several users: prefixes that are shared, and stay."""

import itertools
import random
from typing import Any

import mlx.core as mx

from promptcache.tiers.memory_tier import MAX_PIECES, MemoryTier
from tests.helpers.memory import PLENTY, ids, read, rows


def add(tier: MemoryTier, token_ids: list[int]) -> None:
    tier.insert_shared("f", token_ids, read(token_ids)[0])


def shared(tier: MemoryTier, prompt: list[int]) -> tuple[int, list[Any]]:
    """Share what there is of a prompt, and check that it is what a cold run reads."""
    found = tier.find("f", prompt, lambda position: position)
    assert found is not None
    cache = tier.view(found)
    assert cache is not None
    expected, _ = read(prompt[: found.num_tokens])
    for left, right in zip(rows(cache), rows(expected), strict=True):
        assert mx.allclose(left, right, atol=1e-5).item()
    return found.num_tokens, cache


def test_shared_prefix_stays_and_is_not_written_to() -> None:
    tier = MemoryTier(PLENTY)
    prompt = ids(300, 1)
    tier.insert("f", prompt, read(prompt)[0])

    for seed in (2, 3, 4):
        for length in (299, 300, 120):
            other = [*prompt[:length], *ids(20, seed)]
            num_tokens, cache = shared(tier, other)
            assert num_tokens >= length
            read(other, cache)

    assert len(tier) == 1


def test_added_rows_are_those_that_are_new() -> None:
    tier = MemoryTier(PLENTY)
    system = ids(200, 1)
    add(tier, system)
    before = tier.nbytes

    for seed in range(2, 8):
        add(tier, [*system, *ids(10, seed)])

    assert tier.nbytes < before * 1.5
    for seed in range(2, 8):
        assert shared(tier, [*system, *ids(10, seed), 7])[0] >= 210


def test_adding_again_holds_nothing_twice() -> None:
    tier = MemoryTier(PLENTY)
    add(tier, ids(100, 1))
    before = tier.nbytes

    add(tier, ids(100, 1))
    add(tier, ids(100, 1)[:60])

    assert (len(tier), tier.nbytes) == (1, before)


def test_many_pieces_become_one() -> None:
    tier = MemoryTier(PLENTY)
    prompt = ids(200, 1)

    for end in range(10, 201, 10):
        add(tier, prompt[:end])

    found = tier.find("f", [*prompt, 5], lambda position: position)
    assert found is not None and len(found.pieces) <= MAX_PIECES
    assert shared(tier, [*prompt, 5])[0] == 200
    whole = sum(layer.nbytes for layer in read(prompt)[0])
    assert tier.nbytes <= 2 * whole


def test_trunk_outlives_its_branches() -> None:
    tier = MemoryTier(PLENTY)
    system = ids(200, 1)
    add(tier, system)
    for seed in range(2, 8):
        add(tier, [*system, *ids(10, seed)])

    tier.set_limit(tier.nbytes - 1)

    assert tier.num_evicted == 1
    assert shared(tier, [*system, *ids(10, 2), 5])[0] < 210
    assert shared(tier, [*system, *ids(10, 7), 5])[0] >= 210


def test_random_uses_give_the_rows_of_a_cold_run() -> None:
    choose = random.Random(0)
    tier = MemoryTier(400_000)
    prompts: list[list[int]] = [ids(80, 0)]
    add(tier, prompts[0])

    for seed in itertools.count(1):
        old = choose.choice(prompts)
        prompt = [*old[: choose.randrange(1, len(old))], *ids(40, seed)]
        found = tier.find("f", prompt, lambda position: position)
        if found is not None:
            _, cache = shared(tier, prompt)
            tier.insert_shared("f", prompt, read(prompt, cache)[0])
        else:
            add(tier, prompt)
        prompts.append(prompt)
        assert tier.nbytes <= tier.max_nbytes
        if seed == 60:
            break

    assert tier.num_evicted > 0
