"""Layout of 4-bit expert weights as the kernel reads them: numbers that it shares with the host.

Owns the sizes of a chunk and what lies where in it; `fourbit_pack` writes chunks and reads them
back. Packed weights of an expert are uint8 [tiles, K/128, 4, CHUNK_BYTES]: for every tile of 256
weight rows and every K block of 128 columns four chunks of 64 rows, number 2 * warpgroup + block.

A chunk holds codes in the order of WGMMA's A operand in registers. Of thread = 32 * warp + lane,
lane = 4 * g + t, of a warpgroup

    rows of the chunk    16 * warp + 8 * half + g          half 0..1
    columns              32 * t + 8 * s + 4 * khalf + b    s 0..3, khalf 0..1, b 0..3

make one 32-bit word per (s, half), number 512 * (s // 2) + 4 * thread + 2 * (s % 2) + half of the
chunk. A code is a sign and three bits of magnitude, which in the word are

    magnitude    bits 16 * khalf + 4 * b and the two above
    sign         bit 8 * b + 7 for khalf 0, 8 * b + 3 for khalf 1

SCALE_BYTES follow. MXFP4 has the exponent of row and t, less MIN_EXPONENT, in byte
64 * warp + 8 * g + 2 * t + half, and INT4 the float32 scale of the row in the 4-byte word
16 * warp + 2 * g + half.

To the tensor cores (s, khalf, t, b) are the digits of a place in the K block: a thread has places
32 * s + 16 * khalf + 4 * t + b of its rows. So columns lie at other places (`place_of`), in weights
so that a thread's share an exponent, and therefore also in the rows of tokens that they are
multiplied with: in those that travel, and in the hidden rows between FC1 and FC2.

Which weight row that is:

    gate and up    gate (half 0) or up row (half 1) of the hidden column 128 * tile
                   + column_at(16 * (4 * warpgroup + warp) + 2 * g + block): a thread has both
    down           256 * tile + 32 * (4 * warpgroup + warp) + 16 * block + 8 * half + g
"""

from __future__ import annotations

#: Weight rows and columns of a chunk, and rows of a tile.
CHUNK_ROWS = 64
CHUNK_COLUMNS = 128
TILE_ROWS = 256
CHUNKS_PER_TILE = TILE_ROWS // CHUNK_ROWS

CODE_BYTES = CHUNK_ROWS * CHUNK_COLUMNS // 2
SCALE_BYTES = 4 * CHUNK_ROWS
CHUNK_BYTES = CODE_BYTES + SCALE_BYTES

#: Exponents of MXFP4 groups, relative to their row's, for which all magnitudes are normal numbers
#: of float8_e4m3fn, or 0: they can be added to the exponent bits.
MIN_EXPONENT = -5
MAX_EXPONENT = 6

#: Magnitudes of float4_e2m1 by the three lower bits of a code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def place_of(column):
    """Where a column lies in a row of tokens or of FC1's output; four neighbours from a multiple of
    4 on stay so. Takes an int, a tensor or a traced integer.
    """
    inside = column % CHUNK_COLUMNS
    t, s, khalf = inside // 32, inside // 8 % 4, inside // 4 % 2
    return column - inside + 32 * s + 16 * khalf + 4 * t + inside % 4


def column_at(place):
    """The column that lies at a place of such a row: the inverse of `place_of`."""
    inside = place % CHUNK_COLUMNS
    s, khalf, t = inside // 32, inside // 16 % 2, inside // 4 % 4
    return place - inside + 32 * t + 8 * s + 4 * khalf + inside % 4
