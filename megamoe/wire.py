"""The bytes that cross between ranks, beside the token rows themselves, and to the host.

- routed record (8 bytes, source -> owner): ``slot`` int32 = token * slots_per_token + k on the
  source, ``weight`` float32. Rows of shared experts stay where they are and have none.
- count record (8 bytes, source -> owner): ``count`` int32 rows for one expert, ``offset`` int32 of
  its first record.
- source code (int32, `token_src_metadata`): 0 for a row that pads a block, else 1 + rank *
  max_slots + slot.
- scales of a token row (float32, `input_scale_buffer`): padded with whole words to 16 bytes, what a
  bulk copy moves.
- combine row: H outputs at `combine_output[token][k]` of the source rank, addressed by the slot.
- tile code (int64, `tile_trace`): phase in 8 bits, pool block in 32, tile column above.
- peer word (int32, `abort_flag`): 1 + the rank that gave up in 8 bits, why (a status of
  `megamoe.faults`) above; 0 while nobody has.

Owns these encodings; the kernel and the tests call the same functions.
"""

from __future__ import annotations

from megamoe import dsl

ROUTED_RECORD_BYTES = 8
SCALE_WORDS_GRANULE = 4  # 16 bytes of float32
COUNT_RECORD_BYTES = 8

#: Source code of a row that only pads a pool block.
PADDING = 0


def scale_words(num_scales: int) -> int:
    """Words of a row of `input_scale_buffer` that holds `num_scales` scales."""
    return -(-num_scales // SCALE_WORDS_GRANULE) * SCALE_WORDS_GRANULE


@dsl.jit
def encode_source(rank, slot, max_slots):
    return 1 + rank * max_slots + slot


@dsl.jit
def source_rank(code, max_slots):
    return (code - 1) // max_slots


@dsl.jit
def source_slot(code, max_slots):
    return (code - 1) % max_slots


@dsl.jit
def encode_tile(phase, pool, column):
    return phase + (pool << 8) + (column << 40)


@dsl.jit
def encode_peer(rank, status):
    return 1 + rank + (status << 8)


def decode_peer(word: int) -> tuple[int, int]:
    """(rank, status)."""
    return (word & 0xFF) - 1, word >> 8


def decode_tile(code: int) -> tuple[int, int, int]:
    """(phase, pool block, tile column)."""
    return code & 0xFF, code >> 8 & 0xFFFFFFFF, code >> 40
