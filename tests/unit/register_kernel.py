"""A kernel of one warpgroup whose A is dequantised into registers: codes of 4 bits to e4m3."""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda.bindings.driver as cuda
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float8E4M3FN, Float32, Int32, Int64, Uint32, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from megamoe.compile import CompiledKernel
from megamoe.kernels.ptx import as_word, global_ptr
from tests.unit import standalone

arch = cute.arch

ARGUMENTS = (
    ("codes", ctypes.c_int64),
    ("x", ctypes.c_int64),
    ("sums", ctypes.c_int64),
)
DEPTH = 128
#: What the codes 0 to 7 mean: e4m3 bytes of 0.5, 1, 1.5, 2 and of -0.5, -1, -1.5, -2.
TABLE = 0x403C3830, 0xC0BCB8B0 - (1 << 32)


class Dequantise:
    """sums [128 threads, N / 2] of codes [128 threads, 8 words] times x [N, 128], e4m3."""

    def __init__(self, columns: int):
        self.columns = columns

    @cute.jit
    def __call__(self, codes: Int64, x: Int64, sums: Int64, stream: cuda.CUstream):
        pointer = cute.make_ptr(Float8E4M3FN, x, cute.AddressSpace.gmem, assumed_align=128)
        tensor = cute.make_tensor(
            pointer, cute.make_layout((self.columns, DEPTH), stride=(DEPTH, 1))
        )
        tile = 64, self.columns, DEPTH
        layout = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, tile, Float8E4M3FN, 1)
        atom, tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            tensor,
            cute.slice_(layout, (None, None, 0)),
            (self.columns, DEPTH),
        )
        major = cute.nvgpu.OperandMajorMode.K
        mma = sm90.make_trivial_tiled_mma(
            Float8E4M3FN, Float8E4M3FN, major, major, Float32, atom_layout_mnk=(1, 1, 1),
            tiler_mn=(64, self.columns), a_source=warpgroup.OperandSource.RMEM,
        )  # fmt: skip

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, 1]
            x: cute.struct.Align[cute.struct.MemRange[Float8E4M3FN, cute.cosize(layout)], 1024]

        self.shared = Shared
        self.kernel(atom, tma, codes, sums, layout, mma).launch(
            grid=(1, 1, 1), block=(128, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        atom: cute.CopyAtom,
        tma: cute.Tensor,
        codes: Int64,
        sums: Int64,
        layout: cute.ComposedLayout,
        mma: cute.TiledMma,
    ):
        thread, _, _ = arch.thread_idx()
        shared = SmemAllocator().allocate(self.shared)
        x = shared.x.get_tensor(layout.outer, swizzle=layout.inner)
        full = shared.full.data_ptr()
        if thread == 0:
            arch.mbarrier_init(full, 1)
        arch.mbarrier_init_fence()
        arch.sync_threads()
        tiles = cute.local_tile(tma, (self.columns, DEPTH), (0, None))
        to, source = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(x, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        if arch.make_warp_uniform(arch.warp_idx()) == 0:
            if thread == 0:
                arch.mbarrier_arrive_and_expect_tx(full, self.columns * DEPTH)
            cute.copy(atom, source[None, 0], to[None, 0], tma_bar_ptr=full)
        part = mma.get_slice(thread)
        a = mma.make_fragment_A(part.partition_shape_A((64, DEPTH)))
        b = mma.make_fragment_B(part.partition_B(x))
        total = cute.make_rmem_tensor(part.partition_shape_C((64, self.columns)), Float32)
        words = cute.recast_tensor(a, Int32)
        packed = global_ptr(codes + Int64(thread) * 32)
        for i in range_constexpr(8):
            word = packed[i]
            words[2 * i] = arch.prmt(Int32(TABLE[0]), Int32(TABLE[1]), word)
            high = (Uint32(word) >> Uint32(16)).to(Int32)
            words[2 * i + 1] = arch.prmt(Int32(TABLE[0]), Int32(TABLE[1]), high)
        arch.mbarrier_wait(full, 0)
        issued = cute.make_mma_atom(mma.op)
        warpgroup.fence()
        for k in range_constexpr(DEPTH // 32):
            issued.set(warpgroup.Field.ACCUMULATE, k != 0)
            cute.gemm(issued, total, a[None, None, k], b[None, None, k, 0], total)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
        out = global_ptr(sums + Int64(thread) * (2 * self.columns))
        for i in range_constexpr(self.columns // 2):
            out[i] = as_word(total[i])


def build(columns: int, directory: Path) -> CompiledKernel:
    """For a CPU, into a directory of its own."""
    return standalone.build(Dequantise(columns), f"dequantise_{columns}", ARGUMENTS, directory)
