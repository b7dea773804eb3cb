"""Kernels of the tests for a CPU, each in a library of its own."""

from __future__ import annotations

import ctypes
from pathlib import Path

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_stream

from megamoe import compile, kernel_files
from megamoe.machine import host

FAKE = {ctypes.c_int64: Int64(0), ctypes.c_float: Float32(0.0), ctypes.c_int32: Int32(0)}
#: What every entry takes behind the arguments of its kernel.
TAIL = (("stream", ctypes.c_void_p), ("status", ctypes.c_int32))


def build(kernel, name: str, arguments: tuple, directory: Path) -> compile.CompiledKernel:
    """`kernel`: a callable of the DSL; `arguments`: (name, C type) of its own."""
    values = [FAKE[kind] for _, kind in arguments]

    def make(*options: str):
        return cute.compile(kernel, *values, make_fake_stream(), options=" ".join(options))

    taken = (*arguments, *TAIL)
    facts = {"arguments": [argument for argument, _ in taken]}
    path = compile.build_library(make, directory, name + host.MARK, facts, cpu=True)
    _, description = kernel_files.verified(directory, name + host.MARK, trust=True)
    compiled = compile.CompiledKernel(path, description["entry"], taken)
    compiled.to_device(0)
    return compiled
