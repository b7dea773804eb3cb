"""The C core: its structures as ctypes see them, and how it is compiled, cached and loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

from megamoe.machine import alu
from megamoe.machine.decode import NOBODY, NUMBER, PARAM_BASE

HERE = Path(__file__).parent
SOURCES = (
    "engine.c", "order.c", "copies.c", "sums.c", "schedule.c", "machine.h", "lanes.h"
)  # fmt: skip
FLAGS = (
    "-O1 -ftree-vectorize -fvect-cost-model=dynamic -std=gnu11 -shared -fPIC -fwrapv "
    "-fno-strict-aliasing -ffp-contract=off -fno-math-errno -fno-trapping-math"
)
# Values of the enumerations in machine.h.
DONE, HOST_TURN, FAULTED, DEADLOCK, TOO_LONG, BREAK, MORE = range(7)
FREE, ON_MBARRIER, ON_BARRIER, ON_LAUNCH = range(4)
FAULTS = (
    "", "no memory there", "misaligned", "lanes of the mask are missing", "branches too deep",
    "no mbarrier there", "too many arrivals at an mbarrier", "too many threads at a barrier",
    "no tensor map that fits", "several lanes issue a tensor copy", "no multiple of 16",
    "a descriptor that is not modelled, or leads out of shared memory",
    "registers of a product were used since the last wgmma.fence",
    "the warp ends before its bulk stores or products", "the CTA ends while copies come in",
    "uses registers of a wgmma that no wgmma.wait_group has completed",
)  # fmt: skip


def _fields(text: str) -> list[tuple[str, type]]:
    """Fields of one type a line: 'int32 a b c'."""
    kinds = {
        "int32": c_int32, "int64": c_int64, "uint32": c_uint32, "uint64": c_uint64,
        "pointer": c_void_p,
    }  # fmt: skip
    lines = (line.split() for line in text.strip().splitlines())
    return [(name, kinds[kind]) for kind, *names in lines for name in names]


class CCode(Structure):
    _fields_ = [
        *_fields("""
        pointer instructions extra constants uses
        int32 num_rows num_predicates threads number"""),
        ("shift", c_int32 * 2), ("seen", c_void_p),
    ]  # fmt: skip


class Map(Structure):
    _fields_ = [
        *_fields("uint64 base\nint32 item rank"),
        ("size", c_int64 * 5), ("stride", c_int64 * 5), ("box", c_int32 * 5), ("offset", c_int32),
    ]  # fmt: skip


class Settings(Structure):
    _fields_ = _fields("""
        int32 policy delay budget patient ordered held_share num_ranks max_ctas agents_per_cta
        int32 num_agents
        uint64 seed max_steps""")


class Race(Structure):
    _fields_ = _fields("""
        int32 kind space count rank cta
        uint32 where other agent other_agent
        uint64 address""")


class CBarrier(Structure):
    _fields_ = _fields("""
        uint32 address count flips agent
        int64 pending bytes
        uint64 waiting
        pointer arrived done0 done1""")


class Poll(Structure):
    _fields_ = _fields("int32 pc\nuint64 hash address")


class CWarp(Structure):
    """The beginning of `Warp`."""

    _fields_ = [
        *_fields("""
        pointer machine cta code rows predicates
        int32 index pc rejoin depth segment num_polls
        uint32 mask blocked what ended wrote fences fault
        uint64 address count
        uint32 stores_open products_open num_stores num_products late_products slow lazy
        uint32 timed_out
        pointer stores products"""),
        ("polls", Poll * 8),
    ]


class CCta(Structure):
    """The beginning of `Cta`."""

    _fields_ = [
        *_fields("""
        pointer launch
        int32 index rank num_warps left let
        uint32 num_barriers
        pointer shared barrier_at shadow"""),
        ("barriers", CBarrier * 96),
    ]


class CMachine(Structure):
    """The beginning of `Machine`."""

    _fields_ = [
        ("settings", Settings),
        *_fields("""
        uint64 time rounds steps remote random watch_low watch_high
        pointer stopped races
        int32 num_races"""),
    ]


PROTOTYPES = {
    "machine_new": (POINTER(CMachine), [POINTER(Settings)]),
    "machine_free": (None, [POINTER(CMachine)]),
    "machine_run": (c_int32, [POINTER(CMachine), c_int32]),
    "add_segment": (None, [POINTER(CMachine), c_uint64, c_uint64, c_int32, c_int32, c_void_p]),
    "add_launch": (
        c_int32,
        [POINTER(CMachine), c_int32, POINTER(CCode), c_int32, c_uint32, c_void_p, c_uint32]
        + [POINTER(Map), c_int32],
    ),
    "host_first": (c_int32, [POINTER(CMachine), c_int32]),
    "host_done": (None, [POINTER(CMachine), c_int32]),
    "host_wrote": (None, [POINTER(CMachine), c_int32, c_int32, c_uint64, c_uint64]),
    "running": (c_int32, [POINTER(CMachine), c_int32, c_int32, c_int32, POINTER(POINTER(CWarp))]),
    "begin": (None, [POINTER(CMachine)]),
    "step": (c_int32, [POINTER(CMachine), POINTER(CWarp)]),
}


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _generated() -> dict[str, str]:
    """The headers that are made from tables."""
    names = [f"OP_{name} = {number}" for name, number in NUMBER.items()]
    numbers = (
        f"enum {{ {', '.join(names)}, NOBODY = {NOBODY} }};\n#define PARAM_BASE {PARAM_BASE}ull\n"
    )
    return {"cases.h": alu.c_cases(), "numbers.h": numbers}


def build(directory: Path) -> Path | None:
    """Compile the core for this processor into `directory`, unless it is there; None without a C
    compiler.
    """
    parts = [FLAGS, *_generated().values(), *((HERE / name).read_text() for name in SOURCES)]
    digest = hashlib.sha256("\n".join([*parts, _processor()]).encode()).hexdigest()[:16]
    target = directory / f"machine-native-{digest}.so"
    if target.exists():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for name, text in _generated().items():
            (Path(scratch) / name).write_text(text)
        built = Path(scratch) / target.name
        command = [compiler, *FLAGS.split(), "-march=native", f"-I{scratch}", f"-I{HERE}"]
        subprocess.run([*command, "-o", built, HERE / "engine.c", "-lm"], check=True)
        os.replace(built, target)
    return target


@functools.cache
def library(directory: Path) -> ctypes.CDLL | None:
    """The core, kept in `directory`; None if it is not there and nothing can compile it."""
    path = build(directory)
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def bytes_pointer(data: bytes):
    return ctypes.cast(ctypes.c_char_p(data), c_void_p)
