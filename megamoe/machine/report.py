"""What the machine says: names of barriers and roles, places in the source, who waits for what."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
    return sorted((node.lineno, node.end_lineno, node.name) for node in found)


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


class Names:
    """Names of warps and barriers of one machine. `roles`: of the warps of a CTA, in order."""

    def __init__(self, roles: Sequence[str] = ()):
        self.roles = tuple(roles)
        self._counts: Counter = Counter()

    def role(self, index: int) -> str:
        return self.roles[index] if index < len(self.roles) else ""

    def barrier(self, cta, instr: Instr) -> str:
        """An mbarrier is called by the source of its first argument where it is initialised, and
        numbered among those that the same line makes: mbarrier_init(pipes.full + stage, ...).
        """
        found = re.search(r"mbarrier_init\(\s*([\w.]+)", text_of(instr.place))
        name = found[1] if found else f"mbarrier of {instr.place}"
        key = cta, name
        self._counts[key] += 1
        return f"{name}[{self._counts[key] - 1}]"


def waits(machine) -> str:
    """A line for every warp that has not ended: who waits where for what."""
    lines = []
    for cta in machine.running():
        for warp in cta.warps:
            if not warp.done:
                reason = f"waits for {warp.blocked}" if warp.blocked else machine.watching(warp)
                lines.append(f"{warp}: {where(warp.instr)} {reason}")
    return "\n".join(lines)
