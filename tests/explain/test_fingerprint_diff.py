"""What differs between two fingerprints is named, also by parts that are new."""

import pytest

from promptcache.explain.fingerprint_diff import (
    PART_NAMES,
    change_of_part,
    changed_parts,
)


@pytest.mark.parametrize("name", [*PART_NAMES, "rank"])
def test_part_that_differs_is_named(name: str) -> None:
    [part] = changed_parts({"shared": "1", name: "a"}, {"shared": "1", name: "b"})

    assert part == name
    assert change_of_part(part, "a", "b").startswith(PART_NAMES.get(name, name))


def test_known_parts_come_before_others() -> None:
    before = {"rank": "0", "weights": "a", "kv_bits": ""}
    after = {"rank": "1", "weights": "b", "kv_bits": "8"}

    assert changed_parts(before, after) == ["kv_bits", "weights", "rank"]


def test_namespace_is_not_compared() -> None:
    assert changed_parts({"namespace": "a"}, {"namespace": "b"}) == []
