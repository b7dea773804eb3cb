"""How 4-bit weights lie for the kernel: the numbers that both sides share. `fourbit` packs them,
`kernels/sm90/dequantize.py` reads them.

A chunk is 64 rows x 128 columns of weights: their codes as the threads of a warpgroup read them,
then their exponents or scales. A tile of 256 rows has four for every K block.
"""

ROWS, COLUMNS = 64, 128
GROUP = 32  # columns of a row that share an exponent
STEPS = COLUMNS // GROUP
CODE_BYTES = ROWS * COLUMNS // 2
CHUNK_BYTES = CODE_BYTES + ROWS * STEPS
