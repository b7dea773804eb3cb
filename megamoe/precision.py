"""Precision recipes: one row per recipe, read by the layout, the budget, the reference and the
kernels.

Owns the storage and accumulation dtypes of every tensor of the layer. A recipe without a row is not
supported.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A block that spans the whole row.
WHOLE_ROW = -1


@dataclass(frozen=True)
class Precision:
    """Storage of one recipe; dtype names are torch's (``getattr(torch, name)``).

    Scales are float32 and multiply the stored value. `token_block` and `fc1_out_block` are the
    columns of an activation row that share one (of the layer's input, and of FC1's output);
    `weight_block` the (output channels, columns) of a weight matrix that share one. 0 means no
    scales, WHOLE_ROW one per row.
    """

    name: str
    token: str  # activations on the wire and in the pool
    weight: str  # w13 and w2
    output: str  # combine slots and the layer's output
    token_block: int = 0
    fc1_out_block: int = 0
    weight_block: tuple[int, int] = (0, 0)

    @property
    def scaled(self) -> bool:
        """True if activations and weights carry scales."""
        return self.token_block != 0

    @property
    def token_bytes(self) -> int:
        return ITEM_BYTES[self.token]

    @property
    def output_bytes(self) -> int:
        return ITEM_BYTES[self.output]


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

PRECISIONS = {
    recipe.name: recipe
    for recipe in (
        Precision(name="bf16", token="bfloat16", weight="bfloat16", output="bfloat16"),
        Precision(
            name="fp8_block",
            token="float8_e4m3fn",
            weight="float8_e4m3fn",
            output="bfloat16",
            token_block=FP8_BLOCK,
            fc1_out_block=FP8_BLOCK,
            weight_block=(FP8_BLOCK, FP8_BLOCK),
        ),
        Precision(
            name="fp8_channel",
            token="float8_e4m3fn",
            weight="float8_e4m3fn",
            output="bfloat16",
            token_block=WHOLE_ROW,
            fc1_out_block=FP8_BLOCK,
            weight_block=(1, WHOLE_ROW),
        ),
    )
}


def precision_of(name: str) -> Precision:
    """The recipe called `name`; raises ValueError naming the supported recipes otherwise."""
    if not isinstance(name, str):
        raise ValueError(f"precision={name!r} must be a string")
    if name not in PRECISIONS:
        raise ValueError(f"precision={name!r} is not supported; choose one of {sorted(PRECISIONS)}")
    return PRECISIONS[name]
