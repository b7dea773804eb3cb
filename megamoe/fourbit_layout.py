"""Layout of 4-bit expert weights as the kernel reads them: numbers that it shares with the host.

Owns the sizes of a chunk and what lies where in it; `fourbit_pack` writes chunks and reads them
back. Packed weights of an expert are uint8 [tiles, K/128, 4, CHUNK_BYTES]: for every tile of 256
weight rows and every K block of 128 columns four chunks of 64 rows, number 2 * warpgroup + block.

A chunk holds codes in the order of WGMMA's A operand in registers. Of thread = 32 * warp + lane,
lane = 4 * g + t, of a warpgroup

    rows of the chunk    16 * warp + 8 * half + g           half 0..1
    columns              32 * s + 16 * khalf + 4 * t + b    s 0..3, khalf 0..1, b 0..3

make one 32-bit word per (s, half), number 512 * (s // 2) + 4 * thread + 2 * (s % 2) + half of the
chunk. A code is a sign and three bits of magnitude, which in the word are

    magnitude    bits 16 * khalf + 4 * b and the two above
    sign         bit 8 * b + 7 for khalf 0, 8 * b + 3 for khalf 1

SCALE_BYTES follow. With n = 16 * warp + 2 * g + half, MXFP4 has the exponent of row and s, less
MIN_EXPONENT, in byte 4 * n + s, and INT4 the float32 scale of the row in the 4-byte word n.

Which weight row that is:

    gate and up    gate (half 0) or up row (half 1) 128 * tile + 16 * (4 * warpgroup + warp)
                   + 2 * g + block: a thread has both of a hidden column
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

#: Columns that share a scale.
MXFP4_GROUP = 32
INT4_GROUP = CHUNK_COLUMNS

#: Exponents of MXFP4 groups, relative to their row's, for which all magnitudes are normal numbers
#: of float8_e4m3fn, or 0: they can be added to the exponent bits.
MIN_EXPONENT = -5
MAX_EXPONENT = 6

#: Magnitudes of float4_e2m1 by the three lower bits of a code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
