"""GPU architectures: one row per target, read by the configuration, the budget and the kernels.

Neutral code asks the row that `KernelConfig.arch` names; what needs more than numbers is a folder
of `kernels`. A row without one is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"


@dataclass(frozen=True)
class Architecture:
    """name: of the target, as compilers take it; capability: of its devices.
    folder: of `kernels`, where its `kernel.py` is.
    shared_bytes: of shared memory that a CTA can have.
    group_threads: of a warpgroup, whose registers are set together; registers: that the shares of
    all warpgroups together may hold, per thread, with the front-end counted once: more hangs.
    group_rows: rows of a tile that a math warpgroup multiplies; tile: (block_m, block_n).
    stage_row_bytes: of a row of A or B in a stage, which its swizzle spans: the K block.
    mma_bits: what tensor cores multiply, with the bits of a value.
    """

    name: str
    folder: str
    capability: tuple[int, int]
    shared_bytes: int
    group_threads: int
    registers: int
    group_rows: int
    tile: tuple[int, int]
    stage_row_bytes: int
    mma_bits: tuple[tuple[str, int], ...]

    @cached_property
    def has_kernel(self) -> bool:
        return (KERNELS / self.folder / "kernel.py").is_file()

    def bits_of(self, dtype: str) -> int | None:
        """Bits of a value that tensor cores multiply; None if they do not."""
        return dict(self.mma_bits).get(dtype)


SM90A = Architecture(
    name="sm_90a",
    folder="sm90",
    capability=(9, 0),
    shared_bytes=232448,
    group_threads=128,
    registers=504,  # 168 x 3
    group_rows=64,
    tile=(128, 256),
    stage_row_bytes=128,
    mma_bits=(("bfloat16", 16), ("float8_e4m3fn", 8)),
)

ARCHITECTURES = {row.name: row for row in (SM90A,)}


def with_kernels() -> list[Architecture]:
    """The rows that have a kernel."""
    return [row for row in ARCHITECTURES.values() if row.has_kernel]


def architecture_of(name: str) -> Architecture:
    """The row called `name`; raises ValueError naming those with a kernel otherwise."""
    rows = {row.name: row for row in with_kernels()}
    if not isinstance(name, str) or name not in rows:
        raise ValueError(f"arch={name!r} is not supported; choose one of {list(rows)}")
    return rows[name]
