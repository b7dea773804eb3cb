"""What the machine says: names of barriers and roles, places in the source, who waits for what."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import numpy as np

from megamoe.machine import core
from megamoe.machine.decode import SHARED_BASE
from megamoe.machine.ptx import Instr, Place


@functools.cache
def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@functools.cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of every function, inner ones last."""
    try:
        tree = ast.parse("\n".join(_lines(path)))
    except SyntaxError:
        return []
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return sorted((node.lineno, node.end_lineno or node.lineno, node.name) for node in found)


def text_of(place: Place) -> str:
    """The line of source at a place."""
    lines = _lines(place.path)
    return lines[place.line - 1].strip() if 0 < place.line <= len(lines) else ""


def function_of(place: Place) -> str:
    """The function that a place is in."""
    inside = [name for first, last, name in _functions(place.path) if first <= place.line <= last]
    return inside[-1] if inside else ""


def where(instr: Instr) -> str:
    """An instruction in words: source line, function and line of the PTX."""
    function = function_of(instr.place)
    return f"{instr.place}{f' in {function}' if function else ''} (PTX {instr.line}: {instr.op})"


def shared_name(machine, code, address: int) -> str | None:
    """A word of dynamic shared memory by the part that it lies in; None if nobody named parts."""
    offset = address - SHARED_BASE - code.shared_bytes
    for part in machine.shared:
        if part.begin <= offset < part.begin + part.num_bytes:
            row, column = divmod(offset - part.begin, part.row_bytes)
            return f"{part.name}[{row}]" + (f" byte {column}" if column else "")
    return None


def shared_place(machine, code, address: int) -> str:
    name = shared_name(machine, code, address)
    return f"shared {address}" + (f" ({name})" if name else "")


def barrier_name(warp, address: int) -> str:
    """An mbarrier is called by the part of shared memory that it lies in, or else by the source of
    its first argument where it is initialised, and numbered among those that the same line makes:
    mbarrier_init(pipes.full + stage, ...).
    """
    if (name := shared_name(warp.machine, warp.code, address)) is not None:
        return name
    made = []
    for instr in warp.code.origin:
        if instr.op.startswith("mbarrier.init"):
            found = re.search(r"mbarrier_init\(\s*([\w.]+)", text_of(instr.place))
            made.append(found[1] if found else f"mbarrier of {instr.place}")
    block = warp.block
    for number in range(block.num_barriers):
        if block.barriers[number].address == address and number < len(made):
            return f"{made[number]}[{made[:number].count(made[number])}]"
    return f"mbarrier at {address}"


def note(machine, name: str | None) -> str:
    """What is known about a region, a part of shared memory or a barrier, to follow its name."""
    place = re.match(r"(\w+)(\[\d+\])?", name or "")
    text = (
        machine.notes.get(name)
        or place
        and (machine.notes.get(place[0]) or machine.notes.get(place[1]))
    )
    return f" ({text})" if text else ""


def waiting_for(warp) -> str:
    """What a warp waits for, in words."""
    state, memory = warp.state, warp.machine.memory
    if state.blocked == core.ON_MBARRIER:
        (barrier,) = (b for b in warp.block.barriers if b.address == state.what)
        missing = f"{barrier.pending} of {barrier.count} arrivals and {barrier.bytes} bytes"
        name = barrier_name(warp, state.what)
        known = note(warp.machine, name)
        return f"waits for {name}{known}, phase {barrier.flips}: {missing} missing"
    if state.blocked == core.ON_BARRIER:
        name = f"barrier {state.what}"
        return f"waits at {name}{note(warp.machine, name)}"
    if state.blocked == core.ON_LAUNCH:
        return "waits for the launch before"
    polled = []
    for poll in state.polls[: state.num_polls]:
        if any(s.base <= poll.address < s.end for s in memory.segments):
            value = int(memory.at(poll.address & ~3, 4).view(np.int32)[0])
            name = memory.describe(poll.address)
            polled.append(f"{name}, which is {value}{note(warp.machine, name)}")
    return f"polls {'; '.join(polled)}" if polled else "can go on"


def waits(machine) -> str:
    """A line for every warp that has not ended: who waits where for what."""
    return "\n".join(f"{w}: {where(w.instr)} {waiting_for(w)}" for w in machine.warps())


KINDS = (
    "{what} is not ordered after the write", "write is not ordered after the write",
    "write is not ordered after the read", "read of what nobody wrote in this launch",
    "read of what another launch wrote",
)  # fmt: skip


def agent_name(machine, agent: int) -> str:
    """An agent of `order.c` in words."""
    if agent < machine.num_ranks:
        return f"host of rank {agent}"
    cta, part = divmod(agent - machine.num_ranks, machine.settings.agents_per_cta)
    rank, cta = divmod(cta, machine.settings.max_ctas)
    warp, kind = divmod(part, 4)
    if warp >= machine.warps_per_cta:
        return f"copies of rank {rank}, CTA {cta}"
    kinds = ("lane 0 of", "lanes 1 to 31 of", "bulk stores of", "tensor cores for")
    return f"{kinds[kind]} {machine.name_of(rank, cta, warp)}"


def races(machine) -> list[str]:
    """A line for every race, once per pair of places."""
    lines = []
    for found in machine.found_races():
        one, two = (
            where(machine.codes[place >> 20].origin[place & 0xFFFFF])
            for place in (found.where, found.other)
        )
        if found.space:
            code = machine.codes[found.where >> 20]
            name = shared_name(machine, code, found.address)
            place = shared_place(machine, code, found.address)
        else:
            place = name = machine.memory.describe(found.address)
        first, second = agent_name(machine, found.agent), agent_name(machine, found.other_agent)
        text = f"{place}: {KINDS[found.kind].format(what='read')}: {one} by {first}"
        if found.kind < 3:
            text += f", after {two} by {second}"
        text += note(machine, name)
        lines.append(text + (f" ({found.count} times)" if found.count > 1 else ""))
    return lines
