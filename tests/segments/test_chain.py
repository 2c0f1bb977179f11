"""Chain hashes name prefixes by their token ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptcache import UsageError
from promptcache.segments.chain import BLOCK_SIZE, Chain, common_length, pack, unpack
from tests.helpers.segments import (
    TINY,
    expected_digests,
    expected_key,
    fingerprint,
    shared_length,
)
from tests.helpers.strategies import any_token, prompts, token_lists

DIGEST = TINY.digest


def keys(token_ids: list[int], digest: str = DIGEST) -> list[str]:
    chain = Chain(digest, token_ids)
    return [chain.key_at(i) for i in range(len(token_ids) + 1)]


@settings(deadline=None)
@given(prompts(), prompts())
def test_equal_prefixes_have_equal_chains_and_no_others(
    left: list[int], right: list[int]
) -> None:
    shared = shared_length(left, right)

    pairs = list(zip(keys(left), keys(right), strict=False))

    assert all(a == b for a, b in pairs[: shared + 1])
    assert all(a != b for a, b in pairs[shared + 1 :])


@settings(deadline=None)
@given(token_lists(min_size=1), st.data())
def test_changed_token_changes_all_later_hashes_and_no_earlier(
    token_ids: list[int], data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(token_ids) - 1))
    other = data.draw(any_token.filter(lambda id_: id_ != token_ids[position]))
    changed = [*token_ids[:position], other, *token_ids[position + 1 :]]

    pairs = list(zip(keys(token_ids), keys(changed), strict=True))

    assert all(a == b for a, b in pairs[: position + 1])
    assert all(a != b for a, b in pairs[position + 1 :])


@settings(deadline=None)
@given(token_lists())
def test_block_hashes_are_the_first_64_bits_of_the_digests(
    token_ids: list[int],
) -> None:
    chain = Chain(DIGEST, token_ids)

    hashes = chain.block_hashes(0, len(token_ids))

    digests = expected_digests(DIGEST, token_ids)[1:]
    assert hashes == [int.from_bytes(d[:8], "little", signed=True) for d in digests]
    assert [chain.key_at(32 * (i + 1)) for i in range(len(digests))] == [
        digest.hex() for digest in digests
    ]


@pytest.mark.parametrize(
    ("start", "end", "boundaries"),
    [
        (0, 31, []),
        (0, 32, [1]),
        (0, 96, [1, 2, 3]),
        (32, 64, [2]),
        (31, 64, [1, 2]),
        (33, 63, []),
        (33, 97, [2, 3]),
    ],
)
def test_segment_covers_boundaries_after_its_start_up_to_its_end(
    start: int, end: int, boundaries: list[int]
) -> None:
    chain = Chain(DIGEST, list(range(100)))

    hashes = chain.block_hashes(start, end)

    assert hashes == [chain.block_hash(i) for i in boundaries]


@settings(deadline=None)
@given(token_lists())
def test_key_at_any_position_follows_the_definition(token_ids: list[int]) -> None:
    found = keys(token_ids)

    assert found == [
        expected_key(DIGEST, token_ids[:i]) for i in range(len(token_ids) + 1)
    ]


@settings(deadline=None)
@given(token_lists())
def test_fingerprints_separate_chains(token_ids: list[int]) -> None:
    other = fingerprint("other").digest

    assert not set(keys(token_ids)) & set(keys(token_ids, other))


def test_same_tokens_in_another_place_have_another_hash() -> None:
    chain = Chain(DIGEST, [7] * 96)

    assert len(set(chain.block_hashes(0, 96))) == 3


# These are on people's disks: whoever changes them loses every store.
@pytest.mark.parametrize(
    ("num_tokens", "key"),
    [
        (0, "00112233445566778899aabbccddeeff"),
        (1, "284f44734ef9c67fc7949a8bd64b0f79"),
        (31, "d1720c578e2a039c0959bee5c4eef3be"),
        (32, "8f5d61b80e131431bce35a6986fd45fd"),
        (33, "87e2b6a7eb87bd7540a58b3ca5ac9696"),
        (100, "140d9a8d359a7f264d511496c25097db"),
    ],
)
def test_keys_never_change(num_tokens: int, key: str) -> None:
    token_ids = [(i * 2654435761) % 2**32 for i in range(100)]

    chain = Chain("00112233445566778899aabbccddeeff", token_ids)

    assert chain.key_at(num_tokens) == key


def test_block_hash_never_changes() -> None:
    chain = Chain("00112233445566778899aabbccddeeff", list(range(64)))

    assert chain.block_hashes(0, 64) == [948183961611042018, 108680831499854924]


def test_block_is_32_tokens() -> None:
    assert BLOCK_SIZE == 32


def test_token_ids_are_packed_as_little_endian_uint32() -> None:
    assert pack([1, 0x01020304]) == bytes([1, 0, 0, 0, 4, 3, 2, 1])


@given(token_lists())
def test_unpacked_token_ids_are_the_packed_ones(token_ids: list[int]) -> None:
    assert unpack(pack(token_ids)) == tuple(token_ids)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_id_that_is_no_uint32_is_refused(token_id: int) -> None:
    with pytest.raises(UsageError):
        pack([token_id])


@given(token_lists())
def test_chain_of_packed_token_ids_is_the_same(token_ids: list[int]) -> None:
    packed = Chain(DIGEST, pack(token_ids))

    assert len(packed) == len(token_ids)
    assert packed.key_at(len(packed)) == expected_key(DIGEST, token_ids)
    assert [packed.token_id(i) for i in range(len(packed))] == token_ids


@given(prompts(), prompts())
def test_common_length_is_what_comparing_one_by_one_gives(
    left: list[int], right: list[int]
) -> None:
    assert common_length(pack(left), pack(right)) == shared_length(left, right)


def test_common_length_compares_whole_token_ids() -> None:
    assert common_length(pack([1, 0x0102]), pack([1, 0x0202])) == 1
