"""Served prompts: whose they are, what others can take over, and who waits."""

import copy
import threading
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from promptcache.engine.prefill import prefill
from promptcache.models.loaded import LoadedModel
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.models.settings import DEFAULT_SETTINGS
from promptcache.server.backend.prompt_cache import ServerPromptCache
from promptcache.server.backend.request_state import RequestState, RequestTokens
from promptcache.server.backend.single_flight import SingleFlight
from promptcache.store import PrefixStore
from promptcache.tiers.prefix_cache import FetchedPrefix
from promptcache.tiers.prompt_read import PromptRead
from tests.architectures import architectures

MODEL = LoadedModel(architectures.build("llama"))


def reading(
    token_ids: list[int],
    *boundaries: int,
    model: LoadedModel = MODEL,
    **options: Any,
) -> RequestState:
    plan = PrefillPlan(step_size=options.pop("step_size", 64), boundaries=boundaries)
    return RequestState(
        PromptRead(token_ids, plan, DEFAULT_SETTINGS),
        model,
        model.fingerprint(),
        0,
        16,
        threading.Event(),
        **options,
    )


def test_slices_know_whose_they_are() -> None:
    prompt = RequestTokens(range(10), reading([*range(10)]))

    part = prompt[2:7]
    part += [1, 2]
    again = part[:]
    again.append(5)

    assert isinstance(part, RequestTokens) and isinstance(again, RequestTokens)
    assert again.reading is prompt.reading
    assert again == [2, 3, 4, 5, 6, 1, 2, 5]
    assert prompt[3] == 3


@pytest.mark.parametrize(
    ("shared", "is_sliceable", "expected"),
    [(150, True, 150), (150, False, 128), (30, True, 30), (30, False, 0)],
)
def test_others_take_over_where_a_piece_ends(
    shared: int, is_sliceable: bool, expected: int
) -> None:
    leader = reading([1] * 200, is_sliceable=is_sliceable)
    other = reading([1] * shared + [2] * 50)

    assert leader.usable_by(other) == expected


def test_what_is_read_already_is_no_reason_to_wait() -> None:
    leader = reading([1] * 200)
    leader.begin(FetchedPrefix([], 199))

    assert leader.is_read
    assert leader.usable_by(reading([1] * 300)) == 0


def test_those_who_wait_go_on_in_their_order() -> None:
    held = {1, 2}
    flight = SingleFlight(lambda reading: reading.token_ids[0] in held)
    jobs: list[Any] = [(None, number, None) for number in range(4)]
    readings = [reading([number]) for number in range(4)]

    assert [flight.holds(jobs[n], readings[n]) for n in (0, 1, 2)] == [
        *(False, True, True)
    ]
    assert flight.release() is None
    assert not flight.is_due()
    held.clear()
    flight.look()

    assert flight.is_due()
    assert [flight.release(), flight.release()] == jobs[1:3]
    assert len(flight) == 0


def test_those_whose_client_is_gone_do_not_wait() -> None:
    flight = SingleFlight(lambda reading: True)
    job: Any = (None, None, None)
    one = reading([1])
    assert flight.holds(job, one)

    one.over.set()

    assert flight.release() == job


def test_trouble_of_the_cache_is_a_cold_prompt(store: PrefixStore) -> None:
    cache = ServerPromptCache(store, memory_limit=10**6)
    prompt = RequestTokens([1] * 40, reading([1] * 40))
    # Nothing expects this.
    broken: Any = None
    prompt.reading.read = replace(prompt.reading.read, plan=broken)

    with pytest.warns(UserWarning, match="going on without the cache"):
        found = cache.fetch_nearest_cache(("model", None, None), prompt)
    with pytest.warns(UserWarning, match="is not kept"):
        cache.insert_cache(
            ("model", None, None), prompt, MODEL.make_cache(DEFAULT_SETTINGS)
        )

    assert found == (None, prompt)
    cache.close()


def test_tokens_of_nobody_are_not_cached(store: PrefixStore) -> None:
    cache = ServerPromptCache(store, memory_limit=10**6)

    assert cache.fetch_nearest_cache(("model", None, None), [1, 2]) == (None, [1, 2])
    cache.insert_cache(("model", None, None), [1, 2], [], cache_type="user")

    assert (len(cache), cache.nbytes) == (0, 0)
    assert set(cache.stats_by_type()["memory"]) == {"n_sequences", "n_bytes"}
    cache.close()


def test_answer_leaves_the_place_where_the_next_turn_parts(store: PrefixStore) -> None:
    hybrid = LoadedModel(architectures.build("qwen3_next"))
    cache = ServerPromptCache(store, memory_limit=10**8)
    prompt = reading([*range(5, 46)], 1, 39, model=hybrid, is_sliceable=False)
    token_ids = RequestTokens([*prompt.token_ids, *[7] * 70], prompt)
    cache.fetch_nearest_cache(hybrid.model, token_ids[:41])
    read = hybrid.make_cache(DEFAULT_SETTINGS)

    start = 0
    for end in (1, 39, 40, len(token_ids)):
        prefill(hybrid.model, read, token_ids, start=start, end=end)
        cache.insert_cache(hybrid.model, token_ids[:end], copy.deepcopy(read))
        start = end
    cache.finish()
    cache.close()

    next_turn = [*token_ids[:39], 200, 201, 202]
    assert store.lookup(next_turn, hybrid.fingerprint()).cached_tokens == 39
    assert store.lookup(token_ids, hybrid.fingerprint()).cached_tokens == end


def test_model_that_changes_under_a_request_takes_and_leaves_nothing(
    store: PrefixStore,
) -> None:
    model = LoadedModel(architectures.build("llama"))
    served, key = ServerPromptCache(store, memory_limit=10**8), ("model", None, None)
    prompt = RequestTokens([1] * 40, reading([1] * 40, model=model))
    read = model.make_cache(DEFAULT_SETTINGS)
    prefill(model.model, read, [1] * 40, start=0, end=39)
    served.insert_cache(key, prompt[:39], read, cache_type="user")
    assert served.num_cached(prompt.reading) == 39

    model.model.set_dtype(mx.bfloat16)

    with pytest.warns(UserWarning, match="the model has changed meanwhile"):
        assert served.fetch_nearest_cache(key, prompt) == (None, prompt)
    with pytest.warns(UserWarning, match="the model has changed meanwhile"):
        served.insert_cache(key, prompt[:39], model.make_cache(DEFAULT_SETTINGS))
    assert served.num_cached(reading([1] * 40, model=model)) == 0
    served.close()
