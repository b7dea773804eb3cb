"""The codes that name a row's source, and rows of scales."""

from __future__ import annotations

import random

import pytest

from megamoe.config import MAX_RANKS, MAX_ROUTED_SLOTS
from megamoe.wire import PADDING, encode_source, scale_words, source_rank, source_slot


@pytest.mark.parametrize("world", [1, 2, 8, 72])
@pytest.mark.parametrize("max_slots", [1, 2, 7, 48])
def test_all_codes_round_trip_and_differ(world, max_slots):
    codes = []
    for rank in range(world):
        for slot in range(max_slots):
            code = encode_source(rank, slot, max_slots)
            assert (source_rank(code, max_slots), source_slot(code, max_slots)) == (rank, slot)
            codes.append(code)
    assert PADDING == 0, "zeroed metadata must name no row"
    assert sorted(codes) == list(range(1, world * max_slots + 1))


@pytest.mark.parametrize("world", [1, 2, 8, MAX_RANKS])
def test_largest_code_fits_int32(world):
    max_slots = MAX_ROUTED_SLOTS // world
    for rank in {0, world - 1}:
        for slot in (0, max_slots - 1):
            code = encode_source(rank, slot, max_slots)
            assert 0 < code <= 2**31 - 1
            assert (source_rank(code, max_slots), source_slot(code, max_slots)) == (rank, slot)


@pytest.mark.parametrize("seed", range(10))
def test_random_codes_round_trip(seed):
    rng = random.Random(seed)
    for _ in range(50):
        world, top_k = rng.randint(1, MAX_RANKS), rng.randint(1, 16)
        max_slots = top_k * rng.randint(1, MAX_ROUTED_SLOTS // (world * top_k))
        rank, slot = rng.randrange(world), rng.randrange(max_slots)
        code = encode_source(rank, slot, max_slots)
        assert PADDING < code <= MAX_ROUTED_SLOTS
        assert (source_rank(code, max_slots), source_slot(code, max_slots)) == (rank, slot)


@pytest.mark.parametrize("scales,words", [(0, 0), (1, 4), (4, 4), (5, 8), (56, 56)])
def test_rows_of_scales_are_whole_bulk_copies(scales, words):
    assert scale_words(scales) == words
    assert 4 * words % 16 == 0
