"""Activations: one row per function between FC1 and FC2, and what an epilogue reads by column.

A row says what FC1 computes and what a launch must bring. The function itself is written twice,
for the oracle (`reference.ACTIVATIONS`) and for the device (`kernels.activation`), under the row's
name. The kernel has SwiGLU so far.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.precision import WHOLE_ROW, Operand


@dataclass(frozen=True)
class Activation:
    """gated: FC1 has a gate and an up column for every output, gates first; else one.
    parameters: numbers of a launch, in the order that the functions take them.
    bias: FC1 and FC2 add a number to every column.
    """

    name: str
    gated: bool = True
    parameters: tuple[str, ...] = ()
    bias: bool = False

    def fc1_columns(self, intermediate: int) -> int:
        """Output channels of FC1."""
        return 2 * intermediate if self.gated else intermediate


SWIGLU = Activation("swiglu", parameters=("limit",))

ACTIVATIONS = {
    row.name: row
    for row in (
        SWIGLU,
        Activation("gpt_oss", parameters=("limit", "alpha"), bias=True),
        Activation("relu2", gated=False),
    )
}

MULTIPLY, ADD = "multiply", "add"


@dataclass(frozen=True)
class ColumnOperand:
    """One float32 per output channel of an expert, which its column is combined with."""

    name: str
    combines: str  # MULTIPLY or ADD


def column_operands(
    matrix: str, weights: Operand, activation: Activation
) -> tuple[ColumnOperand, ...]:
    """What the epilogue of "w13" or "w2" reads by column, in the order in which it is applied."""
    operands = []
    if weights.scale_columns == WHOLE_ROW:
        operands.append(ColumnOperand(f"{matrix}_scales", MULTIPLY))
    if activation.bias:
        operands.append(ColumnOperand(f"{matrix}_bias", ADD))
    return tuple(operands)
