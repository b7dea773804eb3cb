"""Precision recipes: one row per recipe, read by the layout, the budget, the reference and the
kernels.

Owns the storage and accumulation dtypes of every tensor of the layer. A recipe without a row is not
supported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Storage of one recipe; dtype names are torch's (``getattr(torch, name)``)."""

    name: str
    token: str  # activations on the wire and in the pool
    weight: str  # w13 and w2
    output: str  # combine slots and the layer's output
    mma_k: int  # columns of one WGMMA instruction

    @property
    def token_bytes(self) -> int:
        return ITEM_BYTES[self.token]

    @property
    def output_bytes(self) -> int:
        return ITEM_BYTES[self.output]


ITEM_BYTES = {
    "uint8": 1,
    "float8_e4m3fn": 1,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
}

PRECISIONS = {
    "bf16": Precision(
        name="bf16", token="bfloat16", weight="bfloat16", output="bfloat16", mma_k=16
    ),
}


def precision_of(name: str) -> Precision:
    """The recipe called `name`; raises ValueError naming the supported recipes otherwise."""
    if name not in PRECISIONS:
        raise ValueError(f"precision={name!r} is not supported; choose one of {sorted(PRECISIONS)}")
    return PRECISIONS[name]
