"""Hypothesis strategies: prompts that share prefixes, and trees of segments."""

from hypothesis import strategies as st

from promptcache.store.index.rows import SegmentNode

any_token = st.integers(0, 2**32 - 1)


def token_lists(*, min_size: int = 0, max_size: int = 200) -> st.SearchStrategy:
    """Return any token ids."""
    return st.lists(any_token, min_size=min_size, max_size=max_size)


@st.composite
def prompts(draw: st.DrawFn, *, max_tokens: int = 200) -> list[int]:
    """Draw a prompt that is likely to share a prefix with others.

    It repeats one token, with a few others thrown in at likely places: around
    the boundaries of blocks.
    """
    length = draw(st.integers(1, max_tokens))
    boundary = st.integers(0, max_tokens // 32).map(lambda i: 32 * i)
    near = st.tuples(boundary, st.integers(-2, 2)).map(lambda t: max(sum(t), 0))
    places = near | st.integers(0, max_tokens)
    changes = draw(st.dictionaries(places, st.integers(1, 2), max_size=3))
    return [changes.get(position, 0) for position in range(length)]


@st.composite
def trees(draw: st.DrawFn, *, max_segments: int = 25) -> list[SegmentNode]:
    """Draw the segments of a store, parents before children."""
    segments: list[SegmentNode] = []
    for id_ in range(1, draw(st.integers(0, max_segments)) + 1):
        segments.append(
            SegmentNode(
                id=id_,
                key=f"{id_:032x}",
                parent_id=draw(st.integers(0, id_ - 1)),
                nbytes=draw(st.integers(0, 100)),
                used_at=float(draw(st.integers(0, 20))),
                pinned=draw(st.integers(0, 9)) == 0,
                model=draw(st.sampled_from(["a", "b"])),
            )
        )
    return draw(st.permutations(segments))
