"""Eviction takes leaves, the least recently used first, and never what is kept."""

from collections.abc import Collection, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import trees

from promptcache.eviction import plan_eviction
from promptcache.types import Leaf

anything = settings(deadline=None, max_examples=300)
sets_of_ids = st.sets(st.integers(1, 25), max_size=3)


def leaf(
    id_: int, parent_id: int = 0, *, used_at: float = 0, pinned: bool = False
) -> Leaf:
    return Leaf(id_, f"{id_:032x}", parent_id, 10, used_at, pinned, "a")


def lineage(segments: Iterable[Leaf], ids: Collection[int]) -> set[int]:
    """Return these ids and those of all ancestors."""
    by_id = {segment.id: segment for segment in segments}
    found = set()
    for id_ in ids:
        while id_ in by_id:
            found.add(id_)
            id_ = by_id[id_].parent_id
    return found


def leaves_of(segments: Collection[Leaf]) -> list[Leaf]:
    parents = {segment.parent_id for segment in segments}
    return [segment for segment in segments if segment.id not in parents]


@anything
@given(trees(), st.none() | st.integers(0, 500), sets_of_ids)
def test_pinned_and_protected_segments_and_their_ancestors_stay(
    segments: list[Leaf], nbytes: int | None, protected: set[int]
) -> None:
    evicted = plan_eviction(segments, nbytes=nbytes, protected=protected)

    pinned = {segment.id for segment in segments if segment.pinned}
    kept = lineage(segments, pinned | protected)
    assert not kept & {segment.id for segment in evicted}


@anything
@given(trees(), st.none() | st.integers(0, 500), sets_of_ids)
def test_each_evicted_segment_is_the_oldest_leaf_that_may_go(
    segments: list[Leaf], nbytes: int | None, protected: set[int]
) -> None:
    evicted = plan_eviction(segments, nbytes=nbytes, protected=protected)

    pinned = {segment.id for segment in segments if segment.pinned}
    kept = lineage(segments, pinned | protected)
    rest = list(segments)
    for segment in evicted:
        candidates = [leaf for leaf in leaves_of(rest) if leaf.id not in kept]
        assert segment in candidates
        assert segment.used_at == min(leaf.used_at for leaf in candidates)
        rest.remove(segment)


@anything
@given(trees(), st.integers(-10, 500), sets_of_ids)
def test_eviction_stops_as_soon_as_it_is_enough(
    segments: list[Leaf], nbytes: int, protected: set[int]
) -> None:
    evicted = plan_eviction(segments, nbytes=nbytes, protected=protected)

    freed = [segment.nbytes for segment in evicted]
    everything = plan_eviction(segments, protected=protected)
    assert sum(freed) >= nbytes or evicted == everything
    assert not freed or sum(freed[:-1]) < nbytes


@anything
@given(trees(), sets_of_ids)
def test_without_a_size_all_that_may_go_goes_once(
    segments: list[Leaf], protected: set[int]
) -> None:
    evicted = plan_eviction(segments, protected=protected)

    pinned = {segment.id for segment in segments if segment.pinned}
    kept = lineage(segments, pinned | protected)
    assert sorted(s.id for s in evicted) == sorted(
        s.id for s in segments if s.id not in kept
    )


@anything
@given(trees())
def test_what_may_not_go_keeps_its_ancestors(segments: list[Leaf]) -> None:
    evicted = plan_eviction(segments, may_go=lambda segment: segment.model == "a")

    kept = {s.id for s in segments if s.model == "b" or s.pinned}
    assert sorted(s.id for s in evicted) == sorted(
        s.id for s in segments if s.id not in lineage(segments, kept)
    )


def test_parent_goes_by_its_own_age_once_its_last_child_went() -> None:
    old_parent = leaf(1, used_at=1)
    child = leaf(2, 1, used_at=2)
    other = leaf(3, used_at=3)

    evicted = plan_eviction([old_parent, child, other])

    assert [segment.id for segment in evicted] == [2, 1, 3]


def test_recently_used_parent_goes_after_older_leaves() -> None:
    parent = leaf(1, used_at=9)
    child = leaf(2, 1, used_at=2)
    other = leaf(3, used_at=3)

    evicted = plan_eviction([parent, child, other])

    assert [segment.id for segment in evicted] == [2, 3, 1]


def test_parent_with_one_child_left_stays() -> None:
    segments = [leaf(1), leaf(2, 1), leaf(3, 1, pinned=True)]

    assert [segment.id for segment in plan_eviction(segments)] == [2]


@pytest.mark.parametrize("nbytes", [0, -1])
def test_nothing_goes_when_nothing_is_needed(nbytes: int) -> None:
    assert plan_eviction([leaf(1)], nbytes=nbytes) == []
