"""TMA maps and the MMA of the SM90 kernel: how tiles of A and B come into shared memory.

A and B are K-major with a 128-byte swizzle. A tile column of FC1 covers 128 gate rows of w13 and
the 128 up rows that belong to them; in shared memory they alternate by 64, so that a warpgroup that
holds a gate column of the accumulator holds its up column too. Weights stay in checkpoint layout:
the order is made by a five-dimensional map.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float8E4M3FN, Float32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.tensor_utils import LayoutEnum

from megamoe.architecture import SM90A
from megamoe.config import KernelConfig

DTYPES = {"bfloat16": BFloat16, "float8_e4m3fn": Float8E4M3FN}

INTERLEAVE = 64  # columns of an FC1 tile that are gate or up in turn
FINE_ROWS, FINE_BOXES = 16, 3  # a tile with few rows loads up to so many boxes of so many rows


def stage_layouts(dtype, kernel: KernelConfig):
    """Shared-memory layouts of all stages of A and B."""
    tile = (kernel.block_m, kernel.block_n, kernel.block_k)
    layout_a = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, tile, dtype, kernel.num_stages)
    layout_b = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, tile, dtype, kernel.num_stages)
    return layout_a, layout_b


def tiled_mma(dtype, columns: int):
    """m64 x `columns` for one warpgroup."""
    major = cute.nvgpu.OperandMajorMode.K
    return sm90.make_trivial_tiled_mma(
        dtype, dtype, major, major, Float32, atom_layout_mnk=(1, 1, 1), tiler_mn=(64, columns)
    )


def gate_up_box(kernel: KernelConfig):
    """Box of `gate_up_map`: (64 rows, gate and up, pairs), K."""
    return (INTERLEAVE, 2, kernel.block_n // (2 * INTERLEAVE)), kernel.block_k


def down_box(kernel: KernelConfig):
    return kernel.block_n, kernel.block_k


def tokens_box(kernel: KernelConfig, rows: int = SM90A.group_rows):
    return rows, kernel.block_k


def _tensor(dtype, address, alignment: int, shape, stride):
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=alignment)
    return cute.make_tensor(pointer, cute.make_layout(shape, stride=stride))


def _map(tensor, stage, box):
    return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tensor, stage, box)


class TokenMaps(NamedTuple):
    """Maps over one buffer of rows: in boxes of the rows that one math warpgroup computes, so that
    rows which only pad a block need not be loaded; and in fine boxes for tiles with few rows.
    """

    atom: cute.CopyAtom
    rows: cute.Tensor
    fine_atom: cute.CopyAtom
    fine_rows: cute.Tensor


class WeightMaps(NamedTuple):
    """Maps over w13 and w2 in checkpoint layout."""

    gate_up_atom: cute.CopyAtom
    gate_up: cute.Tensor
    down_atom: cute.CopyAtom
    down: cute.Tensor


class PackedWeights(NamedTuple):
    """Addresses of packed weights (`fourbit_layout`)."""

    w13: Int64
    w2: Int64


def token_maps(dtype, kernel: KernelConfig, address, rows: int, columns: int) -> TokenMaps:
    """Maps over a [rows, columns] buffer."""
    tensor = _tensor(dtype, address, 128, (rows, columns), (columns, 1))
    maps = []
    for box_rows in (SM90A.group_rows, FINE_ROWS):
        tile = (box_rows, kernel.block_n, kernel.block_k)
        box = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, tile, dtype, 1)
        maps += _map(tensor, cute.slice_(box, (None, None, 0)), tokens_box(kernel, box_rows))
    return TokenMaps(*maps)


def gate_up_map(dtype, kernel: KernelConfig, address, experts: int, intermediate: int, hidden: int):
    """Map over w13 [e, 2I, H], seen as ((64, gate or up, I / 64), H, e)."""
    shape = (INTERLEAVE, 2, intermediate // INTERLEAVE), hidden, experts
    stride = (hidden, intermediate * hidden, INTERLEAVE * hidden), 1, 2 * intermediate * hidden
    tensor = _tensor(dtype, address, 16, shape, stride)
    _, layout_b = stage_layouts(dtype, kernel)
    return _map(tensor, cute.slice_(layout_b, (None, None, 0)), gate_up_box(kernel))


def down_map(dtype, kernel: KernelConfig, address, experts: int, hidden: int, intermediate: int):
    """Map over w2 [e, H, I], seen as (H, I, e); rows past H read as zero."""
    stride = intermediate, 1, hidden * intermediate
    tensor = _tensor(dtype, address, 16, (hidden, intermediate, experts), stride)
    _, layout_b = stage_layouts(dtype, kernel)
    return _map(tensor, cute.slice_(layout_b, (None, None, 0)), down_box(kernel))


def partition(atom, smem, tensor, box, coordinate):
    """(shared side, global side) of one operand's TMA copies along K."""
    tile = cute.local_tile(tensor, box, coordinate)
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(smem, 0, 2), cute.group_modes(tile, 0, 2)
    )
