"""Kernels of the tests as libraries: built ahead of time beside the others, loaded by name."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from megamoe import compile, kernel_files

NAMES = {"peer_order_fenced": True, "peer_order_unfenced": False}
#: Of `peer_order`: bytes of a row, rows that a channel has in flight, bytes between its counters.
ROW_BYTES, ROWS, LINE = 8192, 2, 128
#: Arguments of `PeerOrder.__call__`, then what every entry takes.
ARGUMENTS = (
    ("mine", ctypes.c_int64),
    ("theirs", ctypes.c_int64),
    ("errors", ctypes.c_int64),
    ("timeout_ns", ctypes.c_int64),
    ("channels", ctypes.c_int32),
    ("messages", ctypes.c_int32),
    ("stream", ctypes.c_void_p),
    ("status", ctypes.c_int32),
)


def peer_order_bytes(channels: int) -> int:
    """Memory of one GPU: rows and three counters of every channel."""
    return channels * (ROWS * ROW_BYTES + 3 * LINE)


def _trace(fence: bool):
    import cutlass.cute as cute
    from cutlass import Int32, Int64
    from cutlass.cute.runtime import make_fake_stream
    from cutlass.cutlass_dsl import CuTeDSL

    from tests.gpu.kernels.peer_order import PeerOrder

    CuTeDSL._get_dsl().envar.arch = "sm_90a"
    fake = {ctypes.c_int64: Int64(0), ctypes.c_int32: Int32(0)}
    arguments = [fake[kind] for _, kind in ARGUMENTS[:-2]]
    return cute.compile(PeerOrder(fence), *arguments, make_fake_stream())


def build(directory: Path, name: str) -> Path:
    facts = {"arguments": [argument for argument, _ in ARGUMENTS]}
    return compile.build_library(lambda: _trace(NAMES[name]), directory, name, facts)


def load(name: str) -> compile.CompiledKernel:
    """From $MEGAMOE_KERNEL_DIR; elsewhere it is built first."""
    ahead = os.environ.get("MEGAMOE_KERNEL_DIR")
    directory = Path(ahead) if ahead else compile.cache_dir() / "tests"
    if not ahead:
        build(directory, name)
    path, description = kernel_files.verified(directory, name, trust=compile.trust_kernels())
    return compile.CompiledKernel(path, description["entry"], ARGUMENTS)
