"""The C core: its structures as ctypes see them, and how it is compiled, cached and loaded.

Both engines work on these structures and on the arrays that they point to, so what one has done the
other can go on with. `engine()` is the C core, or the reference where no C compiler exists.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from megamoe.machine import alu
from megamoe.machine.decode import NUMBER

RAN, SERVICE, ENDED, FAULT, POLLED = range(5)
FAULTS = (
    "", "no memory there", "misaligned", "not all lanes of the mask are there", "branches too deep",
)  # fmt: skip
HERE = Path(__file__).parent
FLAGS = (
    "-O3 -std=gnu11 -shared -fPIC -fwrapv -fno-strict-aliasing -ffp-contract=off "
    "-fno-math-errno -fno-trapping-math -march=native"
)
POLLS, FRAMES = 8, 32


class Segment(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64), ("end", ctypes.c_uint64),
        ("rank", ctypes.c_int32), ("readonly", ctypes.c_int32),
    ]  # fmt: skip


class World(ctypes.Structure):
    """`ordered`: strong accesses are services, whose order the machine follows."""

    _fields_ = [
        ("segments", ctypes.POINTER(Segment)), ("num_segments", ctypes.c_int32),
        ("ordered", ctypes.c_int32), ("time", ctypes.c_uint64),
    ]  # fmt: skip


class Frame(ctypes.Structure):
    _fields_ = [("join", ctypes.c_int32), ("mask", ctypes.c_uint32), ("rejoin", ctypes.c_int32)]


class Poll(ctypes.Structure):
    _fields_ = [("pc", ctypes.c_int32), ("hash", ctypes.c_uint64)]


class WarpState(ctypes.Structure):
    _fields_ = [
        ("world", ctypes.POINTER(World)),
        *((name, ctypes.c_void_p) for name in ("code", "extra", "constants", "rows")),
        *((name, ctypes.c_void_p) for name in ("predicates", "shared", "parameters")),
        ("shared_end", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("rank", "pc", "rejoin", "depth")),
        ("mask", ctypes.c_uint32),
        ("active", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("fault", "forced", "touched", "segment", "num_polls")),
        *((name, ctypes.c_uint64) for name in ("address", "count", "remote")),
        ("polls", Poll * POLLS),
        ("frames", Frame * FRAMES),
    ]  # fmt: skip


class Core:
    """The engine in C."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.run = self.library.run
        self.advance = self.library.advance
        state, integer = ctypes.POINTER(WarpState), ctypes.c_int32
        self.run.argtypes, self.advance.argtypes = (state, integer), (state,)
        pointer, wide = ctypes.c_void_p, ctypes.c_uint64
        self.multiply = self.library.multiply
        self.multiply.argtypes = (state, pointer, pointer, wide, wide, *[integer] * 4)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build(directory: Path) -> Path:
    """The core's shared library in `directory`, compiled unless it is there; FileNotFoundError
    without a C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc or gcc) on PATH")
    numbers = ", ".join(f"OP_{name} = {number}" for name, number in NUMBER.items())
    cases = alu.c_cases()
    sources = [HERE / name for name in ("core.c", "lanes.h")]
    parts = [FLAGS, numbers, cases, _processor(), *(path.read_text() for path in sources)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    target = directory / f"machine-{digest}.so"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            (Path(scratch) / "cases.h").write_text(cases)
            (Path(scratch) / "numbers.h").write_text(f"enum {{ {numbers} }};\n")
            built = Path(scratch) / target.name
            command = [compiler, *FLAGS.split(), f"-I{scratch}", f"-I{HERE}", "-include", "numbers.h"]
            subprocess.run([*command, "-o", str(built), str(HERE / "core.c"), "-lm"], check=True)
            os.replace(built, target)
    return target


@functools.cache
def engine(directory: Path) -> Core:
    """The engine to use; the core is kept in `directory`."""
    return Core(build(directory))
