"""Eviction takes leaves, the least recently used first, and never what is kept."""

from collections.abc import Collection, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptcache.segments.types import Priority
from promptcache.store.index.rows import CheckpointRow, SegmentNode
from promptcache.store.maintenance.eviction import (
    CHECKPOINT_SPACING,
    CHECKPOINTS_BESIDE,
    plan_eviction,
    surplus_checkpoints,
)
from promptcache.store.maintenance.prune import removals_of
from tests.helpers.forging import TIMES
from tests.helpers.strategies import trees

anything = settings(deadline=None, max_examples=100 * TIMES)
sets_of_ids = st.sets(st.integers(1, 25), max_size=3)


def leaf(
    id_: int, parent_id: int = 0, *, used_at: float = 0, pinned: bool = False
) -> SegmentNode:
    return SegmentNode(id_, f"{id_:032x}", parent_id, 10, used_at, pinned, "a")


def lineage(segments: Iterable[SegmentNode], ids: Collection[int]) -> set[int]:
    """Return these ids and those of all ancestors."""
    by_id = {segment.id: segment for segment in segments}
    found = set()
    for id_ in ids:
        while id_ in by_id:
            found.add(id_)
            id_ = by_id[id_].parent_id
    return found


def pin(segments: Iterable[SegmentNode], ids: Collection[int]) -> list[SegmentNode]:
    """Return segments of which these ids are pinned, too."""
    return [s._replace(pinned=s.pinned or s.id in ids) for s in segments]


def leaves_of(segments: Collection[SegmentNode]) -> list[SegmentNode]:
    parents = {segment.parent_id for segment in segments}
    return [segment for segment in segments if segment.id not in parents]


@anything
@given(trees(), st.none() | st.integers(0, 500), sets_of_ids)
def test_pinned_segments_and_their_ancestors_stay(
    segments: list[SegmentNode], nbytes: int | None, protected: set[int]
) -> None:
    segments = pin(segments, protected)

    evicted = plan_eviction(segments, nbytes=nbytes)

    kept = lineage(segments, {segment.id for segment in segments if segment.pinned})
    assert not kept & {segment.id for segment in evicted}


@anything
@given(trees(), st.none() | st.integers(0, 500), sets_of_ids)
def test_each_evicted_segment_is_the_oldest_leaf_that_may_go(
    segments: list[SegmentNode], nbytes: int | None, protected: set[int]
) -> None:
    segments = pin(segments, protected)

    evicted = plan_eviction(segments, nbytes=nbytes)

    kept = lineage(segments, {segment.id for segment in segments if segment.pinned})
    rest = list(segments)
    for segment in evicted:
        candidates = [leaf for leaf in leaves_of(rest) if leaf.id not in kept]
        assert segment in candidates
        assert segment.used_at == min(leaf.used_at for leaf in candidates)
        rest.remove(segment)


@anything
@given(trees(), st.integers(-10, 500), sets_of_ids)
def test_eviction_stops_as_soon_as_it_is_enough(
    segments: list[SegmentNode], nbytes: int, protected: set[int]
) -> None:
    segments = pin(segments, protected)

    evicted = plan_eviction(segments, nbytes=nbytes)

    freed = [segment.nbytes for segment in evicted]
    everything = plan_eviction(segments)
    assert sum(freed) >= nbytes or evicted == everything
    assert not freed or sum(freed[:-1]) < nbytes


@anything
@given(trees(), sets_of_ids)
def test_without_a_size_all_that_may_go_goes_once(
    segments: list[SegmentNode], protected: set[int]
) -> None:
    segments = pin(segments, protected)

    evicted = plan_eviction(segments)

    kept = lineage(segments, {segment.id for segment in segments if segment.pinned})
    assert sorted(s.id for s in evicted) == sorted(
        s.id for s in segments if s.id not in kept
    )


@anything
@given(trees())
def test_what_may_not_go_keeps_its_ancestors(segments: list[SegmentNode]) -> None:
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


def test_deepest_of_those_used_at_once_goes_first() -> None:
    segments = [
        SegmentNode(id_, f"{id_:032x}", 0, 10, 1.0, False, "a", True, start)
        for id_, start in ((1, 300), (2, 900), (3, 600))
    ]

    assert [segment.start for segment in plan_eviction(segments)] == [900, 600, 300]


def test_rows_that_no_run_can_resume_from_go_first() -> None:
    """Unless they are so new that their checkpoint may be on its way."""

    def rows(id_: int, used_at: float) -> SegmentNode:
        return leaf(id_, used_at=used_at)._replace(needs_checkpoint=True)

    state = leaf(3, 2, used_at=600)._replace(needs_checkpoint=True, is_checkpoint=True)
    segments = [leaf(1, used_at=1), rows(2, 600), state, rows(4, 500), rows(5, 950)]

    evicted = plan_eviction(segments, now=1000)

    assert [segment.id for segment in evicted] == [4, 1, 3, 2, 5]


def test_whole_segments_go_before_those_that_are_cut() -> None:
    cut, whole = leaf(1)._replace(cut_at=5), leaf(2)

    removals = removals_of({cut: "old", whole: "old"})

    assert [removal.key for removal in removals] == [whole.key, cut.key]


def test_parent_with_one_child_left_stays() -> None:
    segments = [leaf(1), leaf(2, 1), leaf(3, 1, pinned=True)]

    assert [segment.id for segment in plan_eviction(segments)] == [2]


@pytest.mark.parametrize("nbytes", [0, -1])
def test_nothing_goes_when_nothing_is_needed(nbytes: int) -> None:
    assert plan_eviction([leaf(1)], nbytes=nbytes) == []


# Checkpoints


def checkpoint(
    position: int, *, is_prefix: bool = False, priority: Priority = Priority.BOUNDARY
) -> CheckpointRow:
    return CheckpointRow(
        key=f"{position:032x}",
        parent_id=1,
        position=position,
        priority=priority,
        is_prefix=is_prefix,
    )


any_checkpoints = st.dictionaries(
    st.integers(1, 100_000) | st.integers(1, 400),
    st.tuples(st.booleans(), st.sampled_from(Priority)),
    min_size=1,
    max_size=40,
).map(
    lambda found: [
        checkpoint(position, is_prefix=flags[0], priority=flags[1])
        for position, flags in sorted(found.items())
    ]
)


def after_each(positions: Iterable[int]) -> list[CheckpointRow]:
    """Return what is left of checkpoints that were taken one after the other."""
    kept: list[CheckpointRow] = []
    for position in positions:
        kept.append(checkpoint(position))
        surplus = surplus_checkpoints(kept)
        kept = [one for one in kept if one not in surplus]
    return kept


def bucket(newest: CheckpointRow, other: CheckpointRow) -> int:
    """Return how far away a checkpoint is, as a power of two."""
    distance = newest.position - other.position
    return distance.bit_length() if distance >= CHECKPOINT_SPACING else 0


@anything
@given(any_checkpoints)
def test_newest_checkpoint_and_the_first_boundary_stay(
    on_way: list[CheckpointRow],
) -> None:
    surplus = surplus_checkpoints(on_way)

    first = [c for c in on_way if c.priority > Priority.STEP or c.is_prefix][:1]
    assert not {on_way[-1], *first} & set(surplus)
    assert len(set(surplus)) == len(surplus)
    assert set(surplus) < set(on_way)


@anything
@given(any_checkpoints)
def test_checkpoint_goes_for_another_one_about_as_far_away(
    on_way: list[CheckpointRow],
) -> None:
    surplus = surplus_checkpoints(on_way)

    kept = [c for c in on_way[:-1] if c not in surplus]
    for gone in surplus:
        rivals = [c for c in kept if bucket(on_way[-1], c) == bucket(on_way[-1], gone)]
        priority = (gone.is_prefix, gone.priority)
        assert any((c.is_prefix, c.priority) >= priority for c in rivals)


@anything
@given(any_checkpoints)
def test_number_of_checkpoints_grows_with_the_logarithm_of_the_length(
    on_way: list[CheckpointRow],
) -> None:
    num_kept = len(on_way) - len(surplus_checkpoints(on_way))

    length = on_way[-1].position - on_way[0].position
    num_buckets = (length // CHECKPOINT_SPACING).bit_length() + 1
    num_built = sum(checkpoint.priority == Priority.BUILT for checkpoint in on_way)
    assert num_kept <= num_buckets + 3 + num_built


@anything
@given(any_checkpoints)
def test_thinning_twice_takes_nothing_more(on_way: list[CheckpointRow]) -> None:
    surplus = surplus_checkpoints(on_way)

    assert surplus_checkpoints([c for c in on_way if c not in surplus]) == []


@anything
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=40, unique=True))
def test_far_fork_loses_no_more_than_it_shares_with_the_newest(
    positions: list[int],
) -> None:
    """Of equals, the first one in twice the distance stays."""
    on_way = [checkpoint(position) for position in sorted(positions)]
    surplus = surplus_checkpoints(on_way)

    newest = on_way[-1].position
    for gone in surplus:
        distance = newest - gone.position
        if distance >= CHECKPOINT_SPACING:
            kept = [c for c in on_way if c not in surplus]
            before = max(c.position for c in kept if c.position <= gone.position)
            assert newest - before < 2 * distance


@pytest.mark.parametrize("turn", [20, 30, 32, 50, 64, 65, 100, 128, 500, 1000, 2048])
def test_long_conversation_keeps_a_checkpoint_before_every_fork(turn: int) -> None:
    """Thinned after each turn, it is at most about seven times as far away."""
    ends = range(100, 100 + 300 * turn, turn)
    for num_turns in (10, 100, 137, 200, 255, 299):
        kept = [c.position for c in after_each(ends[:num_turns])]

        newest = ends[num_turns - 1]
        for fork in ends[:num_turns]:
            distance = newest - fork
            before = max(position for position in kept if position <= fork)
            assert newest - before <= 8 * distance + CHECKPOINT_SPACING


@pytest.mark.parametrize("turn", [20, 64, 100, 2048])
def test_long_conversation_keeps_few_checkpoints(turn: int) -> None:
    kept = after_each(range(100, 100 + 1000 * turn, turn))

    assert len(kept) <= (1000 * turn // CHECKPOINT_SPACING).bit_length() + 3


def test_end_of_a_prefix_stays_rather_than_a_boundary_and_that_than_a_step() -> None:
    step = checkpoint(1000, priority=Priority.STEP)
    boundary = checkpoint(1010)
    prefix = checkpoint(1020, is_prefix=True, priority=Priority.STEP)
    first, newest = checkpoint(5), checkpoint(1600)

    def surplus(*others: CheckpointRow) -> list[CheckpointRow]:
        return surplus_checkpoints([first, *others, newest])

    assert surplus(step, boundary, prefix) == [step, boundary]
    assert surplus(step, boundary) == [step]
    assert surplus(step, prefix) == [step]
    assert surplus(boundary, prefix) == [boundary]


def test_first_step_goes_where_a_boundary_is_as_far_away() -> None:
    step = checkpoint(1000, priority=Priority.STEP)

    surplus = surplus_checkpoints([step, checkpoint(1010), checkpoint(1600)])

    assert surplus == [step]


def test_only_checkpoint_stays() -> None:
    assert surplus_checkpoints([checkpoint(100)]) == []


@given(st.lists(st.integers(1, 1000), unique=True, max_size=8))
def test_last_checkpoints_beside_the_way_stay(positions: list[int]) -> None:
    beside = [checkpoint(position) for position in sorted(positions)]

    surplus = surplus_checkpoints([checkpoint(5), checkpoint(500)], beside)

    assert surplus == beside[:-CHECKPOINTS_BESIDE]


@anything
@given(any_checkpoints, st.integers(1, 100_000))
def test_last_checkpoint_before_the_next_turn_parts_stays(
    on_way: list[CheckpointRow], next_turn: int
) -> None:
    surplus = surplus_checkpoints(on_way, next_turn=next_turn)

    before = [c for c in on_way[:-1] if c.position <= next_turn]
    assert on_way[-1].position <= next_turn or not {*before[-1:]} & {*surplus}


def test_earlier_starts_of_answers_go_by_powers_of_two() -> None:
    places = [
        checkpoint(5),
        *(checkpoint(i, priority=Priority.ANSWER) for i in range(9, 60)),
    ]

    surplus = surplus_checkpoints([*places, checkpoint(70)], next_turn=59)

    assert surplus == places[2:-1]


def test_places_where_other_conversations_go_on_stay_beside_the_way() -> None:
    """What is left of turns of this one does not take theirs."""
    answer = checkpoint(10, priority=Priority.ANSWER)
    ends = [checkpoint(position) for position in range(20, 60, 10)]

    surplus = surplus_checkpoints([checkpoint(5), checkpoint(90)], [answer, *ends])

    assert surplus == ends[:-CHECKPOINTS_BESIDE]
