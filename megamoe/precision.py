"""Precision recipes: one row per recipe, read by the layout, the budget, the reference and the
kernels.

Owns how every operand of the two products is stored, scaled and multiplied: A is the tokens in FC1
and the rows of FC1's output in FC2, B the weights. A recipe without a row is not supported; which
rows a kernel can run is for `config.supports`.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A block that spans the whole row.
WHOLE_ROW = -1
#: The block of an operand without scales.
NO_SCALES = (0, 0)


@dataclass(frozen=True)
class Operand:
    """How one operand is stored and multiplied; dtype names are torch's (``getattr(torch, name)``).

    storage: dtype of the tensor in memory; bits: of one value there.
    mma: dtype that the tensor cores multiply: `storage`, unless it is converted on the way.
    scale_block: (rows, columns) that share a scale, which multiplies the stored value: rows are
    tokens or output channels, columns go along K, WHOLE_ROW being all of them. NO_SCALES: none.
    scale: dtype of the scales.
    """

    storage: str
    bits: int
    mma: str
    scale_block: tuple[int, int] = NO_SCALES
    scale: str = "float32"

    @property
    def has_scales(self) -> bool:
        return self.scale_block != NO_SCALES

    @property
    def packed(self) -> bool:
        """True if values are parts of a byte: they lie in chunks with their scales, which come
        with the stages, and are converted behind shared memory.
        """
        return self.bits < 8

    @property
    def scales_values(self) -> bool:
        """Of packed values: True if scales become part of what is multiplied, as powers of two do;
        else they multiply the sums over the columns that share them.
        """
        return self.packed and self.scale == "uint8"

    @property
    def scale_columns(self) -> int:
        """Columns of a row that share a scale: 0 without scales, WHOLE_ROW for one per row."""
        return self.scale_block[1]

    @property
    def scales_along_k(self) -> bool:
        """True if a row has several scales."""
        return self.scale_block[1] > 0

    @property
    def scales_sums(self) -> bool:
        """True if sums over blocks of K are multiplied by scales."""
        return self.scales_along_k and not self.scales_values

    @property
    def tile_scales(self) -> bool:
        """Of weights: True if scales by block come with a tile, laid out for it."""
        return self.scales_along_k and not self.packed

    @property
    def row_factors(self) -> bool:
        """Of weights: True if a row's sums are multiplied by a factor of its own at the end."""
        return self.packed or self.scale_columns == WHOLE_ROW

    def num_bytes(self, values: int) -> int:
        """Bytes of so many values."""
        return values * self.bits // 8

    def num_scales(self, columns: int) -> int:
        """Scales of a row of `columns` values."""
        return num_scales(columns, self.scale_columns)


@dataclass(frozen=True)
class Precision:
    """Storage of one recipe."""

    name: str
    tokens: Operand  # on the wire and in the pool: A of FC1
    weights: Operand  # w13 and w2: B of both
    hidden: Operand  # FC1's output: A of FC2
    output: str  # dtype of combine slots and the layer's output

    @property
    def output_bytes(self) -> int:
        return ITEM_BYTES[self.output]

    @property
    def fc1_promotes(self) -> bool:
        """True if FC1 adds up blocks of K times their scales, in registers of their own."""
        return self.tokens.scales_sums or self.weights.scales_sums

    @property
    def fc2_promotes(self) -> bool:
        return self.hidden.scales_sums or self.weights.scales_sums

    @property
    def promotes(self) -> bool:
        return self.fc1_promotes or self.fc2_promotes

    @property
    def stages_scales(self) -> bool:
        """True if scales of A come with the stages, in FC1 or in FC2."""
        return self.tokens.scales_along_k or self.hidden.scales_along_k


def num_scales(columns: int, block: int) -> int:
    """Scales along `columns` columns in blocks of `block`: 0 without scales."""
    if block == 0:
        return 0
    return 1 if block == WHOLE_ROW else -(-columns // block)


ITEM_BYTES = {
    "uint8": 1,
    "float8_e4m3fn": 1,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
}

#: Largest finite value of float8_e4m3fn.
FP8_MAX = 448.0
#: A block whose largest magnitude is below this is quantised as if it were this.
FP8_MIN_AMAX = 1e-10
#: Columns that share a scale in DeepSeek-V3 checkpoints, and rows of a weight block.
FP8_BLOCK = 128

BF16 = Operand("bfloat16", 16, "bfloat16")


def e4m3(rows: int, columns: int) -> Operand:
    """Stored as float8_e4m3fn, with a scale per block of this size."""
    return Operand("float8_e4m3fn", 8, "float8_e4m3fn", (rows, columns))


#: 4-bit values (e2m1) with a power of two per 32 columns: OCP Microscaling Formats 1.0.
MXFP4 = Operand("uint8", 4, "float8_e4m3fn", (1, 32), "uint8")
#: 4-bit integers with a scale per 128 columns, as GPTQ and AWQ make them.
INT4 = Operand("uint8", 4, "float8_e4m3fn", (1, FP8_BLOCK))
#: Packed operands that there is a format for (`megamoe.fourbit`).
PACKED = (MXFP4, INT4)


def _fp8(name: str, tokens: Operand, weights: Operand) -> Precision:
    """Hidden rows are e4m3 too, with a scale per 128 columns."""
    return Precision(name, tokens, weights, hidden=e4m3(1, FP8_BLOCK), output="bfloat16")


PRECISIONS = {
    recipe.name: recipe
    for recipe in (
        Precision(name="bf16", tokens=BF16, weights=BF16, hidden=BF16, output="bfloat16"),
        _fp8("fp8_block", tokens=e4m3(1, FP8_BLOCK), weights=e4m3(FP8_BLOCK, FP8_BLOCK)),
        _fp8("fp8_channel", tokens=e4m3(1, WHOLE_ROW), weights=e4m3(1, WHOLE_ROW)),
        _fp8("fp8_mxfp4", tokens=e4m3(1, FP8_BLOCK), weights=MXFP4),
        _fp8("fp8_mxfp4_token", tokens=e4m3(1, WHOLE_ROW), weights=MXFP4),
        _fp8("fp8_int4", tokens=e4m3(1, FP8_BLOCK), weights=INT4),
    )
}


def precision_of(name: str) -> Precision:
    """The recipe called `name`; raises ValueError naming the supported recipes otherwise."""
    if not isinstance(name, str):
        raise ValueError(f"precision={name!r} must be a string")
    if name not in PRECISIONS:
        raise ValueError(f"precision={name!r} is not supported; choose one of {sorted(PRECISIONS)}")
    return PRECISIONS[name]
