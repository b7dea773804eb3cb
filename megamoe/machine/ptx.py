"""PTX text -> entries: instructions with their names resolved, parameters, labels, source lines.

Owns the syntax alone: what an instruction means is `decode`'s matter. Registers and labels of
inline assembly live in scopes and get names of their own; every instruction knows its line in the
PTX and, where the compiler left line information, the place in the kernel's source.
"""

from __future__ import annotations

import re
from bisect import bisect
from dataclasses import dataclass, field

#: Bits of a register of each type; 1 is a predicate.
BITS = {"pred": 1} | {f"{kind}{n}": n for kind in "bus" for n in (8, 16, 32, 64)} | {"f32": 32}
TOKEN = re.compile(r"\s*(?:(\{)|(\})|([\w$]+):(?!:)|([^;]+);)")
NAME = re.compile(r"(?<![\w.%])%?[A-Za-z_$][\w$.]*")


class SyntaxFault(ValueError):
    """Text that this parser does not follow."""


@dataclass(frozen=True)
class Place:
    """A place in the kernel's source; an empty path if the PTX does not say."""

    path: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path.rsplit('/', 1)[-1]}:{self.line}" if self.path else "?"


@dataclass
class Instr:
    op: str
    args: list[str]
    guard: str  # predicate that it depends on, or ""
    negated: bool
    line: int  # in the PTX
    place: Place

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.op} {', '.join(self.args)}"


@dataclass
class Entry:
    """One kernel. `params`: (offset, bytes) by name; `shared`: (bytes, alignment) by name."""

    name: str
    threads: int
    params: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # name -> bits

    @property
    def param_bytes(self) -> int:
        return max((offset + size for offset, size in self.params.values()), default=0)


def split(text: str) -> list[str]:
    """Operands: at commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts]


def parse(text: str) -> dict[str, Entry]:
    """All entries of a module, by name."""
    text = re.sub(r"//[^\n]*", "", text.replace("\0", ""))
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    text = re.sub(r"^([ \t]*\.loc[ \t][^\n]*)$", r"\1;", text, flags=re.M)
    starts = [match.start() for match in re.finditer(r"(\.visible\s+)?\.entry\b", text)]
    entries = [Reader(text, start, files).entry for start in starts]
    if not entries:
        raise SyntaxFault("no .entry in the PTX")
    return {entry.name: entry for entry in entries}


def matched(found: re.Match[str] | None, what: str) -> re.Match[str]:
    """The match; SyntaxFault where there is none."""
    if found is None:
        raise SyntaxFault(f"not understood: {what!r}")
    return found


class Reader:
    """Reads the entry that begins at `start`."""

    def __init__(self, text: str, start: int, files: dict[str, str]):
        signature = re.compile(r"[^(]*\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)")
        head = matched(signature.match(text, start), "entry")
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
        self.entry = Entry(head[1], int(threads[1]) if threads else 0)
        self.files, self.place = files, Place()
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self._signature(head[2])
        self._shared(text[:start])
        self._body(text, head.end())

    def _signature(self, text: str) -> None:
        offset = 0
        for item in filter(str.strip, text.split(",")):
            parameter = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?"
            found = matched(re.search(parameter, item), item)
            size = BITS[found[2]] // 8
            alignment = int(found[1] or size)
            offset = -(-offset // alignment) * alignment
            size *= int(found[4] or 1)
            self.entry.params[found[3]] = offset, size
            offset += size

    def _shared(self, text: str) -> None:
        """Shared variables of `text`; those without a size are dynamic memory."""
        variable = r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]"
        for alignment, name, size in re.findall(variable, text):
            self.entry.shared[name] = int(size or 0), int(alignment)

    def _body(self, text: str, position: int) -> None:
        entry, scopes, count = self.entry, [], 0
        while True:
            token = TOKEN.match(text, position)
            if not token:
                raise SyntaxFault(
                    f"line {self._line(position)}: {text[position : position + 60]!r}"
                )
            position = token.end()
            opened, closed, label, statement = token.groups()
            if opened:
                count += 1
                scopes.append({"": f"@{count}"})
            elif closed:
                scopes.pop()
                if not scopes:
                    break
            elif label:
                name = label if len(scopes) == 1 else label + scopes[-1][""]
                scopes[-1][label] = name
                entry.labels[name] = len(entry.instrs)
            else:
                self._statement(statement.strip(), scopes, token.start(4))
        for instr in entry.instrs:
            if instr.op.startswith("bra") and instr.args[0] not in entry.labels:
                raise SyntaxFault(f"line {instr.line}: no label {instr.args[0]}")

    def _line(self, position: int) -> int:
        return bisect(self.newlines, position) + 1

    def _statement(self, text: str, scopes: list[dict[str, str]], position: int) -> None:
        if text.startswith(".loc"):
            number, line = text.split()[1:3]
            self.place = Place(self.files.get(number, ""), int(line))
        elif text.startswith(".reg"):
            self._registers(text, scopes)
        elif text.startswith(".shared"):
            self._shared(text)
        elif not text.startswith("."):
            self._instruction(text, scopes, position)

    def _registers(self, text: str, scopes: list[dict[str, str]]) -> None:
        _, kind, names = text.split(None, 2)
        for item in names.split(","):
            many = re.fullmatch(r"\s*(%\w+)<(\d+)>", item)
            some = [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [item.strip()]
            for name in some:
                own = name if len(scopes) == 1 else name + scopes[-1][""]
                scopes[-1][name] = own
                self.entry.registers[own] = BITS[kind[1:]]

    def _instruction(self, text: str, scopes: list[dict[str, str]], position: int) -> None:
        def resolve(name: str) -> str:
            return next((scope[name] for scope in reversed(scopes) if name in scope), name)

        found = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?(\S+)\s*(.*)", text, re.S)
        guard, op, rest = matched(found, text).groups()
        if op.startswith("bra"):  # the label of a scope may follow
            args = [rest if rest.startswith("$") else rest + scopes[-1][""]]
        else:
            args = [NAME.sub(lambda name: resolve(name[0]), part) for part in split(rest)]
        negated = bool(guard) and guard[0] == "!"
        name = resolve(guard.lstrip("!")) if guard else ""
        line = self._line(position)
        self.entry.instrs.append(Instr(op, args, name, negated, line, self.place))
