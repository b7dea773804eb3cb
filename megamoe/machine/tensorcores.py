"""Tensor cores: groups of wgmma instructions of a warp.

An instruction is performed at its issue or, as the policy says, at the wait for its group, in
order: what it reads may not change, and what it adds up may not be looked at, in between. Operands
are K-major with a 128-byte swizzle, or A in registers.
"""

from __future__ import annotations

import re

import numpy as np

from megamoe.machine.barriers import NEXT
from megamoe.machine.faults import Fault

SHAPE = re.compile(r"m64n(\d+)k(?:16\.f32\.(bf16)\.bf16|32\.f32\.(e4m3)\.e4m3)$")


def wgmma(machine, warp, service) -> int:
    kind = service.words[1]
    if warp.s.active != 0xFFFFFFFF:
        raise Fault(f"{warp}: {service.instr.op} without all lanes")
    if kind == "fence":
        warp.s.touched = 0
    elif kind == "commit_group":
        warp.mma.append([])
    elif kind == "wait_group":
        while len(warp.mma) - 1 > service.operands[0]:
            for finish in warp.mma.pop(0):
                finish()
    else:
        _issue(machine, warp, service)
    return NEXT


def _check(warp, descriptor: int, rows: int) -> None:
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 62 != 1:
        raise Fault(f"{warp}: descriptor {descriptor:#x} is not one with a 128-byte swizzle")
    if start < 1024 or start + (rows // 8 - 1) * stride + 1024 > warp.s.shared_end + 96:
        raise Fault(f"{warp}: {rows} rows from shared {start}, which ends at {warp.s.shared_end}")


def _issue(machine, warp, service) -> None:
    sums, left, right, predicate = service.operands
    found = SHAPE.search(service.instr.op)
    if not found:
        raise Fault(f"{warp}: {service.instr.op} is not modelled")
    if machine.order and warp.s.touched:
        raise Fault(
            f"{warp}: registers of {service.instr.op} were used since the last wgmma.fence"
        )
    columns, kind = int(found[1]), found[2] or found[3]
    first = 16 * (warp.index % 4)
    a = 0 if isinstance(left, list) else warp.value(left, 0)
    b = warp.value(right, 0)
    for descriptor, rows in ((a, 64), (b, columns)):
        if descriptor:
            _check(warp, descriptor, rows)
    registers = left if isinstance(left, list) else None
    keep = warp.predicate(predicate, 0)

    late = machine.multiplies_late() or warp.late_products > 0
    warp.late_products += late

    def action():
        warp.late_products -= late
        machine.multiply(warp, sums, registers, a, b, columns, keep, kind, first)

    if machine.order:
        for descriptor, rows, start in ((a, 16, first), (b, columns, 0)):
            if descriptor:
                machine.order.operand(warp, descriptor, rows, start, service.instr)
    if late:
        warp.mma[-1].append(action)
    else:
        action()
    if machine.order:
        warp.mma[-1].append(machine.order.multiplied(warp))


def operand_rows(descriptor: int, rows: int, first: int) -> np.ndarray:
    """Addresses of the two halves of 16 bytes of every row: [rows, 2]."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row = first + np.arange(rows)[:, None]
    address = start + row // 8 * stride + row % 8 * 128 + 16 * np.arange(2)
    return address ^ (address >> 7 & 7) << 4
