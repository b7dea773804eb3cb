"""The machine: streams of launches on ranks that share memory, executed by the C core.

A rank has a stream; its launches run one after the other, those of different ranks side by side. In
a round every warp that can run executes up to `budget` instructions, so time, which is counted in
instructions, is that of warps side by side.

Policies of what is asynchronous: "eager", copies at once; "late", copies some rounds later;
"tardy", tensor cores and bulk stores read at their waits; "random", any of it. A seed other than 0
also shuffles warps and cuts their turns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.machine import core, report
from megamoe.machine.decode import SHARED_BASE, Code
from megamoe.machine.faults import Deadlock, Fault, Races, StepLimit
from megamoe.machine.memory import Memory, Region
from megamoe.machine.reference import Reference
from megamoe.machine.tensormap import TensorMap

#: Code, CTAs, bytes of the parameters and of dynamic shared memory.
Launch = tuple[Code, int, bytes, int]
POLICIES = ("eager", "late", "tardy", "random")
LATE_ROUNDS = 8  # that a late copy takes
BUDGET = 1000
ROUNDS = 500  # between two looks at signals
#: Agents of a CTA: four a warp, and one for each of its mbarriers (`order.c`).
MAX_WARPS, MAX_BARRIERS = 32, 96


class Warp:
    """A warp that runs, as the core has it."""

    def __init__(self, machine: Machine, rank: int, cta: int, index: int, state):
        self.machine, self.rank, self.cta, self.index, self.state = machine, rank, cta, index, state
        self.code = machine.codes[core.CCode.from_address(state.code).number]

    def __str__(self) -> str:
        return self.machine.name_of(self.rank, self.cta, self.index)

    @property
    def instr(self):
        return self.code.origin[min(self.state.pc, len(self.code.origin) - 1)]

    @property
    def block(self) -> core.CCta:
        return core.CCta.from_address(self.state.cta)

    def rows(self) -> np.ndarray:
        """Its registers: uint32 [rows, 32]."""
        size = self.code.num_rows * 32
        return _array(self.state.rows, ctypes.c_uint32, size).reshape(-1, 32)

    def register(self, name: str) -> np.ndarray:
        """The lanes of a register by its name in PTX: uint32, uint64, or bool of a predicate."""
        if name in self.code.predicates:
            mask = _array(self.state.predicates, ctypes.c_uint32, self.code.num_predicates)
            return (mask[self.code.predicates[name]] >> np.arange(32, dtype=np.uint32) & 1).astype(
                bool
            )
        row, bits = self.code.rows[name], self.code.entry.registers.get(name, 32)
        lanes = self.rows()[row : row + bits // 32 or 1].reshape(-1)
        return lanes.view(np.uint64) if bits == 64 else lanes

    def shared(self) -> np.ndarray:
        """Shared memory of its CTA."""
        return _array(self.block.shared, ctypes.c_uint8, self.machine.shared_end)


def _array(address: int, kind: type[ctypes.c_uint32 | ctypes.c_uint8], count: int) -> np.ndarray:
    return np.ctypeslib.as_array((kind * count).from_address(address))


class Machine:
    """directory: where the core is kept. num_ranks: that launch here. checks: follow the order of
    accesses and report races. held_share: percent of releases at which stores that nobody has
    ordered yet stay unseen; with checks. roles: names of a CTA's warps. shared: parts of its
    dynamic shared memory. notes: what reports add to the names of regions and parts (with a row in
    brackets or without) and to `barrier 2`. patient: a launch in which everybody waits goes on at a
    later time, so that its own timeouts end it.
    """

    def __init__(
        self,
        directory: Path,
        num_ranks: int = 1,
        policy: str = "eager",
        seed: int = 0,
        checks: bool = False,
        held_share: int = 0,
        roles: Sequence[str] = (),
        shared: Sequence[Region] = (),
        notes: Mapping[str, str] | None = None,
        patient: bool = False,
        max_steps: int = 0,
        budget: int = BUDGET,
    ):
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not one of {POLICIES}")
        self.num_ranks, self.roles, self.shared = num_ranks, tuple(roles), tuple(shared)
        self.notes = notes or {}
        self.core: Any = core.library(directory)  # None without a C compiler
        self.settings = core.Settings(
            policy=POLICIES.index(policy), delay=LATE_ROUNDS, budget=budget, patient=patient,
            ordered=checks, held_share=held_share, num_ranks=num_ranks, seed=seed,
            max_steps=max_steps, agents_per_cta=4 * MAX_WARPS + MAX_BARRIERS,
        )  # fmt: skip
        self.memory = Memory()
        self.codes: list[Code] = []
        self.shared_end = 0
        self.on_break: Callable[[Warp], None] | None = None
        self.watched = 0, 0
        self._streams: list[list[Launch | Callable[[], None]]] = [[] for _ in range(num_ranks)]
        self.c: Any = None  # points to the core's `CMachine`
        self._kept: list = []

    # What is to be done

    def launch(
        self, code: Code, grid: int, parameters: bytes, dynamic_shared: int = 0, rank: int = 0
    ) -> None:
        """Append a launch to the stream of a rank. `parameters`: the bytes that it finds."""
        self._streams[rank].append((code, grid, parameters, dynamic_shared))

    def call(self, function: Callable[[], None], rank: int = 0) -> None:
        """Append what the host does to a stream: after the launches before it."""
        self._streams[rank].append(function)

    def launched(self) -> list[Code]:
        """The code of all launches."""
        items = [item for stream in self._streams for item in stream if isinstance(item, tuple)]
        return list({id(item[0]): item[0] for item in items}.values())

    def watch(self, low: int, high: int) -> None:
        """Stop after stores of warps to these addresses."""
        self.watched = low, high

    # Running

    def run(self) -> None:
        """Run every stream to its end; raises a `MachineError` if it does not come to one, or if
        checks find that accesses race.
        """
        if self.core is None:
            return self._run_reference()
        self.make()
        while (status := self.core.machine_run(self.c, ROUNDS)) != core.DONE:
            if status == core.HOST_TURN:
                self._hosts()
            elif status == core.FAULTED:
                raise Fault(self._fault())
            elif status == core.DEADLOCK:
                raise Deadlock("nobody can go on:\n" + report.waits(self))
            elif status == core.TOO_LONG:
                limit = self.settings.max_steps
                raise StepLimit(f"no end after {limit} instructions\n{report.waits(self)}")
            elif status == core.BREAK and self.on_break:
                self.on_break(self.stopped())
        races = report.races(self)
        if races:
            raise Races("\n".join(races))

    def __del__(self):
        if getattr(self, "c", None):
            self.core.machine_free(self.c)

    def onto(self, reference: Reference) -> None:
        """The same launches."""
        for rank, stream in enumerate(self._streams):
            for item in stream:
                if isinstance(item, tuple):
                    reference.launch(*item, rank)
                else:
                    item()

    def _run_reference(self) -> None:
        if self.settings.ordered or any(len(stream) > 2 for stream in self._streams):
            raise Fault("checks, and several launches at once, need a C compiler")
        reference = Reference(self.memory)
        self.onto(reference)
        reference.run()

    def make(self) -> None:
        """The core's machine, with all memory and launches."""
        grids = [item[1] for stream in self._streams for item in stream if isinstance(item, tuple)]
        settings, shift = self.settings, 2
        settings.max_ctas = max(grids, default=1)
        settings.num_agents = self.num_ranks * (1 + settings.max_ctas * settings.agents_per_cta)
        self.c = self.core.machine_new(settings)
        self.c.contents.watch_low, self.c.contents.watch_high = self.watched
        for stream in self._streams:
            for item in stream:
                if isinstance(item, tuple):
                    shift = min(shift, item[0].granule[0].bit_length() - 1)
        for segment in self.memory.segments:
            fresh = segment.fresh_lines() if settings.ordered else None
            self._kept.append(fresh)
            pointer = None if fresh is None else fresh.ctypes.data
            size = len(segment.bytes)
            self.core.add_segment(self.c, segment.base, size, segment.rank, shift, pointer)
        for rank, stream in enumerate(self._streams):
            for item in stream:
                if isinstance(item, tuple):
                    self._add(rank, *item)
                else:
                    self.core.add_launch(self.c, rank, None, 0, 0, None, 0, None, 0)

    def _add(self, rank: int, code: Code, grid: int, parameters: bytes, dynamic: int) -> None:
        if code not in self.codes:
            self.codes.append(code)
        number = self.codes.index(code)
        c_code = core.CCode(
            code.instructions.ctypes.data, code.extra.ctypes.data, code.constants.ctypes.data,
            code.uses.ctypes.data, code.num_rows, code.num_predicates, code.entry.threads, number,
            (ctypes.c_int32 * 2)(*(size.bit_length() - 1 for size in code.granule)),
            None if code.seen is None else code.seen.ctypes.data,
        )  # fmt: skip
        found = [
            TensorMap(parameters[offset : offset + size]).packed(offset, self.memory)
            for offset, size in code.entry.params.values()
            if size == 128
        ]
        maps = (core.Map * max(1, len(found)))(*found)
        self.shared_end = SHARED_BASE + code.shared_bytes + dynamic
        data = core.bytes_pointer(parameters)
        self.core.add_launch(
            self.c, rank, c_code, grid, self.shared_end, data, len(parameters), maps, len(found)
        )
        self._kept += [c_code, parameters, maps]

    def _hosts(self) -> None:
        """Do what the hosts do that come first in their streams."""
        for rank, stream in enumerate(self._streams):
            if self.core.host_first(self.c, rank):
                first = next(item for item in stream if not isinstance(item, tuple))
                first()
                stream.remove(first)
                self.core.host_done(self.c, rank)

    # What it is at

    @property
    def steps(self) -> int:
        """Instructions that have been executed."""
        return self.c.contents.steps if self.c else 0

    @property
    def rounds(self) -> int:
        return self.c.contents.rounds

    @property
    def remote_bytes(self) -> int:
        """Bytes of accesses to memory of other ranks."""
        return self.c.contents.remote if self.c else 0

    @property
    def warps_per_cta(self) -> int:
        return max(code.entry.threads for code in self.codes) // 32

    def found_races(self) -> list[core.Race]:
        machine = self.c.contents
        return list((core.Race * machine.num_races).from_address(machine.races))

    def name_of(self, rank: int, cta: int, warp: int) -> str:
        role = f" ({self.roles[warp]})" if warp < len(self.roles) else ""
        return f"rank {rank}, CTA {cta}, warp {warp}{role}"

    def warps(self) -> Iterator[Warp]:
        """Those that have not ended, of the launches that run last."""
        pointer = ctypes.POINTER(core.CWarp)()
        for rank in range(self.num_ranks):
            for cta in range(self.settings.max_ctas):
                for index in range(MAX_WARPS):
                    found = self.core.running(self.c, rank, cta, index, ctypes.byref(pointer))
                    if found == 2:
                        yield Warp(self, rank, cta, index, pointer.contents)

    def stopped(self) -> Warp:
        """The warp that the last stop is about."""
        state = core.CWarp.from_address(self.c.contents.stopped)
        block = core.CCta.from_address(state.cta)
        return Warp(self, block.rank, block.index, state.index, state)

    def _fault(self) -> str:
        warp = self.stopped()
        shared = ".shared" in warp.instr.op.partition(".global")[0]
        address = warp.state.address
        place = self.memory.describe(address)
        if shared:
            place = report.shared_place(self, warp.code, address)
        fault = core.FAULTS[warp.state.fault]
        return f"{warp}: {report.where(warp.instr)}: {fault}; last access: {place}"
