"""4-bit weights on their way to the tensor cores: from chunks in shared memory to e4m3 in the
registers that WGMMA reads as its first operand.

A chunk (`megamoe.fourbit_layout`) holds 64 rows x 128 columns as the threads of a warpgroup read
them: two loads of 16 bytes bring a thread 64 codes. PRMT looks up four codes at a time in a table
of the eight magnitudes, 8 bytes of e4m3. What is the format's own is in DECODERS. MXFP4: two bytes
are the exponents of a thread, one for all that it has of a row, which are added to the table:
exact, as long as no value leaves the normal range of e4m3 (`megamoe.fourbit_pack` rebases exponents
so). INT4: one table for all, and scales that multiply the sums over a K block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Uint32

from megamoe.fourbit_layout import CHUNK_COLUMNS, CODE_BYTES
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import as_float, load_shared_u16, load_shared_v2, load_shared_v4
from megamoe.precision import INT4, MXFP4

arch = cute.arch

STEPS = CHUNK_COLUMNS // 32  # of a product's K
#: e4m3 of 0, .5, 1, 1.5 and of 2, 3, 4, 6, times 2^-5, first in the lowest byte; one more exponent
#: adds 8 to all but the zero.
LOW, HIGH = 0x14100800, 0x24201C18
LOW_STEP, HIGH_STEP = 0x08080800, 0x08080808
#: e4m3 of 0, 1, 2, 3 and of 4, 5, 6, 7. Constants, which ptxas moves into a register before every
#: PRMT, 32 times in a K block: held in registers they made the tile of 128 tokens spill.
INT_LOW, INT_HIGH = 0x44403800, 0x4E4C4A48
MAGNITUDES, SIGNS = 0x77777777, -0x7F7F7F80  # 0x80808080 as an Int32


def load_exponents(chunk, thread):
    """Those of a thread, in a word: that of either row is a byte."""
    return load_shared_u16(chunk + (CODE_BYTES + thread * 2))


def scaled_table(exponents, half: int):
    """The table with the exponent of a row."""
    exponent = arch.prmt(exponents, Int32(0), Int32(0x4440 + half))
    return exponent * Int32(LOW_STEP) + Int32(LOW), exponent * Int32(HIGH_STEP) + Int32(HIGH)


def load_row_scales(chunk, thread):
    """Float32 of both rows of a thread."""
    return [as_float(word) for word in load_shared_v2(chunk + (CODE_BYTES + thread // 4 * 8))]


class Decoder(NamedTuple):
    """What a packed format does its own way; (chunk, thread) are as in `load_codes`.

    exponents: of (chunk, thread), what `table` takes; table: of (exponents, half), the two words of
    the table for a row; row_scales: of (chunk, thread), what sums of either row are multiplied by,
    or None.
    """

    exponents: Callable
    table: Callable
    row_scales: Callable


def _nothing(chunk, thread):
    return None


#: By operand (`megamoe.precision`).
DECODERS = {
    MXFP4: Decoder(load_exponents, scaled_table, _nothing),
    INT4: Decoder(_nothing, lambda *_: (Int32(INT_LOW), Int32(INT_HIGH)), load_row_scales),
}


def decoder_of(launch: Launch) -> Decoder:
    return DECODERS[launch.shape.config.recipe.weights]


def load_codes(launch: Launch, chunk, thread):
    """(codes, exponents) of a thread of a warpgroup, in words. `chunk`: its shared memory."""
    words = []
    for half in range(2):
        words += load_shared_v4(chunk + (half * (CODE_BYTES // 2) + thread * 16))
    return words, decoder_of(launch).exponents(chunk, thread)


def expand(launch: Launch, fragment, codes, exponents):
    """Write a thread's part of a K block, e4m3, into `fragment` (Int32 [16]): register 4 s + half +
    2 k is row lane / 4 + 8 half, places 32 s + 16 k + 4 (lane % 4) and following.
    """
    tables = [decoder_of(launch).table(exponents, half) for half in range(2)]
    for step in range(STEPS):
        for half in range(2):
            low, high = tables[half]
            word = codes[2 * step + half]
            magnitudes = word & Int32(MAGNITUDES)
            upper = (Uint32(magnitudes) >> Uint32(16)).to(Int32)
            signs = Int32(SIGNS)
            fragment[4 * step + half] = arch.prmt(low, high, magnitudes) | (word & signs)
            fragment[4 * step + 2 + half] = arch.prmt(low, high, upper) | (
                (word << Int32(4)) & signs
            )
