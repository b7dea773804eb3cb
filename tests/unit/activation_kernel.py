"""A kernel that only activates: sums of FC1 in, outputs out, by the functions of the device."""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int64, const_expr

from megamoe.activation import Activation
from megamoe.compile import CompiledKernel
from megamoe.kernels.activation import ACTIVATIONS
from megamoe.kernels.ptx import as_float, as_word, load_global_v2, store_global_v2
from tests.unit import standalone

arch = cute.arch

ARGUMENTS = (
    ("sums", ctypes.c_int64),
    ("bias", ctypes.c_int64),
    ("out", ctypes.c_int64),
    ("limit", ctypes.c_float),
    ("alpha", ctypes.c_float),
)


class Activate:
    """[32, C] sums to [32, I] outputs, a row a lane; pairs of neighbouring columns."""

    def __init__(self, row: Activation, intermediate: int):
        self.row, self.intermediate = row, intermediate
        self.columns = row.fc1_columns(intermediate)
        self.device = ACTIVATIONS[row.name]

    @cute.jit
    def __call__(
        self,
        sums: Int64,
        bias: Int64,
        out: Int64,
        limit: Float32,
        alpha: Float32,
        stream: cuda.CUstream,
    ):
        self.kernel(sums, bias, out, limit, alpha).launch(
            grid=(1, 1, 1), block=(32, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, sums: Int64, bias: Int64, out: Int64, limit: Float32, alpha: Float32):
        lane, _, _ = arch.thread_idx()
        for pair in range(self.intermediate // 2):
            gates = self.columns_of(sums, bias, lane, 2 * pair, False, limit)
            ups = None
            if const_expr(self.row.gated):
                at = 2 * pair + self.intermediate
                ups = self.columns_of(sums, bias, lane, at, True, limit)
            low, high = self.device.outputs(gates, ups, [alpha][: len(self.row.parameters) - 1])
            place = Int64(lane) * self.intermediate + 2 * pair
            store_global_v2(out + place * 4, as_word(low), as_word(high))

    @cute.jit
    def columns_of(self, sums, bias, lane, column, is_up: cute.Constexpr, limit):
        """Two neighbouring sums with their bias, bounded: an infinite limit is none."""
        words = load_global_v2(sums + (Int64(lane) * self.columns + column) * 4)
        values = [as_float(word) for word in words]
        if const_expr(self.row.bias):
            words = load_global_v2(bias + Int64(column) * 4)
            values = [values[q] + as_float(words[q]) for q in range(2)]
        if const_expr(self.device.bound is not None):
            values = [self.device.bound(value, is_up, limit) for value in values]
        return values


def build(row: Activation, intermediate: int, directory: Path) -> CompiledKernel:
    """For a CPU, into a directory of its own."""
    kernel = Activate(row, intermediate)
    return standalone.build(kernel, f"activate_{row.name}", ARGUMENTS, directory)
