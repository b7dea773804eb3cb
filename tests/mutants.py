"""Kernels with one ordering operation dropped or weakened: copies of decoded code with an
instruction changed, named by what it does and who does it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megamoe.machine import alu, decode, report
from megamoe.machine.decode import ACQUIRE, NUMBER, RELAXED, RELEASE, STRONG, SYSTEM, Code
from tests.machine import Layer
from workspace.layout import PADDING

NAMES = {number: name for name, number in NUMBER.items()}
PLENTY = 0x3FFFFFFF  # what a wait reads that does not wait
OR = decode.ATOMICS.index("or")


@dataclass(frozen=True)
class Mutant:
    """`change` gives the fields of instruction `index` that differ, and constants and lists that
    they refer to.
    """

    name: str
    index: int
    change: Callable[[Code], dict[str, int]]

    def of(self, code: Code) -> Code:
        """A copy of the code with the change."""
        code = copy.copy(code)
        code.instructions, code.seen = code.instructions.copy(), None
        for name, value in self.change(code).items():
            code.instructions[name][self.index] = value
        return code


def watch(layer: Layer) -> Code:
    """The layer's code, which from now on notes who executes what."""
    (code,) = layer.backend.kernel.launches.codes().values()
    code.seen = np.zeros((len(code.instructions), 2), np.uint64)
    return code


def install(layer: Layer, code: Code) -> None:
    layer.backend.kernel.launches.codes = lambda: {code.entry.name: code}


class Mutator:
    """Changes of `code`, which has been watched while a layer ran."""

    def __init__(self, layer: Layer, code: Code):
        self.layer, self.code = layer, code
        self.roles = layer.backend.machine.roles
        inits = [i for i in self._executed() if self._op(i) == "mbarrier_init"]
        self.barriers = {}
        for index in inits:
            address = int(code.seen[index, 0])
            name = report.shared_name(layer.backend.machine, code, address)
            self.barriers[address] = name.partition("[")[0]

    def _executed(self) -> list[int]:
        return np.flatnonzero(self.code.seen[:, 1]).tolist()

    def _op(self, index: int) -> str:
        return NAMES.get(int(self.code.instructions["op"][index]), "")

    def _who(self, index: int) -> str:
        mask = int(self.code.seen[index, 1])
        roles = {role for warp, role in enumerate(self.roles) if mask >> warp & 1}
        return "all" if len(roles) > 3 else "+".join(sorted(roles))

    def _subject(self, index: int) -> str:
        """What an instruction is about: barrier, region or nothing."""
        op, instr = self._op(index), self.code.origin[index]
        address = int(self.code.seen[index, 0])
        if op.startswith("mbarrier"):
            return self.barriers[address]
        if op.startswith("bar_"):
            return f"barrier {self.code.instructions['n'][index]}"
        if op in ("ld", "st", "atom"):
            if ".shared" in instr.op:
                return "shared"
            return self._about(address)
        return ""

    def _about(self, address: int) -> str:
        return self.layer.backend.machine.memory.describe(address).partition("[")[0]

    def regions_of(self, *ops: str) -> set[str]:
        """Regions of the workspace that executed operations of these names were about."""
        executed = [index for index in self._executed() if self._op(index) in ops]
        about = {self._about(int(self.code.seen[index, 0])) for index in executed}
        return about & set(self.layer.workspace.layout.regions)

    def _pads(self, index: int) -> bool:
        """Whether an instruction is about padding metadata."""
        region = self.layer.workspace.layout.regions.get(self._subject(index))
        return region is not None and region.kind == PADDING

    def _variants(self, index: int) -> Iterator[tuple[str, Callable]]:
        """(what is done to the instruction, its change)"""
        op, flags = self._op(index), int(self.code.instructions["flags"][index])

        def fields(**values: int) -> Callable:
            return lambda code: values

        dropped = fields(op=NUMBER["nop"])
        if op in (
            "fence",
            "fence_proxy",
            "warp_sync",
            "bar_sync",
            "stores_wait",
            "mma_fence",
            "mma_wait",
        ):
            yield f"no {op}", dropped
        elif op in ("mbarrier_try", "mbarrier_test"):
            yield "no wait", fields(op=alu.TABLE["mov.pred"].number, a=1)
            yield "relaxed wait", fields(flags=flags | RELAXED)
        elif op in ("mbarrier_arrive", "mbarrier_expect"):
            yield "no arrival", dropped
            yield "relaxed arrival", fields(flags=flags | RELAXED)
        elif op == "atom":
            yield "no increment", lambda code: _or_zero(code, int(code.instructions["x"][index]))
        elif op == "st" and (flags & STRONG or self._pads(index)):
            yield "no store", dropped
        elif op == "ld" and flags & STRONG and not flags & ACQUIRE:
            yield (
                "reads plenty",
                lambda code: {
                    "op": alu.TABLE["mov.b32"].number,
                    "d": int(code.extra[int(code.instructions["x"][index]) + 5]),
                    "a": _constant(code, PLENTY),
                },
            )
        if op in ("atom", "ld", "st", "fence") and "volatile" not in self.code.origin[index].op:
            for bit, name in ((ACQUIRE, "acquire"), (RELEASE, "release"), (SYSTEM, "sys scope")):
                if flags & bit and (op != "fence" or bit == SYSTEM):
                    yield f"no {name}", fields(flags=flags & ~bit)

    def mutants(self) -> list[Mutant]:
        found, counts = [], Counter()
        for index in self._executed():
            for what, change in self._variants(index):
                function = report.function_of(self.code.origin[index].place)
                parts = [what, self._subject(index), f"by {self._who(index)} in {function}"]
                name = " ".join(filter(None, parts))
                counts[name] += 1
                number = f" #{counts[name]}" if counts[name] > 1 else ""
                found.append(Mutant(name + number, index, change))
        return found


def _constant(code: Code, value: int) -> int:
    code.constants = np.concatenate([code.constants, np.full((1, 32), value, np.uint32)])
    return -len(code.constants)


def _or_zero(code: Code, x: int) -> dict[str, int]:
    """An atomic that changes nothing, and says so."""
    code.extra = np.concatenate([code.extra, code.extra[x : x + 5]])
    code.extra[-3] = OR
    return {"x": len(code.extra) - 5, "c": _constant(code, 0)}
