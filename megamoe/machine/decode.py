"""A PTX entry -> code that both engines execute: an array of instructions over numbered registers.

Owns the meaning of operands: register rows, constants, special registers, parameters, addresses. An
operation of lanes is a row of `alu.TABLE`, anything else one of `CORE`; what is in neither is
`Unmodelled`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from megamoe.machine import alu
from megamoe.machine.ptx import BITS, Entry, Instr

#: `Instruction` in `machine.h`. d, a, b, c: registers; n, x: what the operation makes of them.
INSTRUCTION = np.dtype(
    [("op", "u2"), ("flags", "u2"), *((name, "i4") for name in ("guard", *"dabcnx"))]
)  # fmt: skip
NEGATED, USES_OPERANDS, STRONG, ACQUIRE, RELEASE, SYSTEM, STOPS, RELAXED = (
    1 << bit for bit in range(8)
)
SEMANTICS = {
    "relaxed": STRONG, "volatile": STRONG | SYSTEM, "acquire": STRONG | ACQUIRE,
    "release": STRONG | RELEASE, "acq_rel": STRONG | ACQUIRE | RELEASE,
}  # fmt: skip

#: Operations that are not of lanes; those from warp_sync on are for whole warps.
CORE = (
    "nop", "bra", "ret", "param", "timer", "shfl_idx", "shfl_up", "shfl_down", "shfl_bfly",
    "vote_ballot", "vote_any", "vote_all", "redux_max_s", "redux_min_s", "redux_max_u",
    "redux_min_u", "elect", "ld", "st", "atom", "sleep", "fence", "fence_proxy", "launch_wait",
    "launch_let", "mbarrier_init", "mbarrier_arrive", "mbarrier_expect", "mbarrier_try",
    "mbarrier_test", "load_bulk", "load_tensor", "store_bulk", "stores_commit", "stores_wait",
    "warp_sync", "stmatrix", "ldmatrix", "bar_sync", "bar_arrive", "mma", "mma_fence",
    "mma_commit", "mma_wait",
)  # fmt: skip
#: Numbers of the operations of `CORE`, after those of lanes.
NUMBER = {name: len(alu.OPERATIONS) + i for i, name in enumerate(CORE)}
ATOMICS = ("add", "exch", "cas", "and", "or", "xor", "min_u", "max_u", "min_s", "max_s")
GLOBAL, SHARED = 0, 1
#: Rows that hold what no instruction writes.
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x", "%ntid.x", "%laneid", "%warpid")
SHARED_BASE, PARAM_BASE, NOBODY = 1024, 1 << 60, -(1 << 30)
NOTHING = ("setmaxnreg", "prefetch", "fence.mbarrier_init")
SHAPE = re.compile(r"m64n(\d+)k(?:16\.f32\.(bf16)\.bf16|32\.f32\.(e4m3)\.e4m3)$")
KINDS = {"e4m3": 0, "bf16": 1}


class Unmodelled(NotImplementedError):
    """The machine does not know an instruction."""


@dataclass
class Code:
    entry: Entry
    instructions: np.ndarray = field(init=False)
    extra: np.ndarray = field(init=False)  # int32: lists that instructions refer to
    constants: np.ndarray = field(init=False)  # uint32 [n, 32]
    uses: np.ndarray = field(init=False)  # int32: by instruction, where its list in `extra` begins
    rows: dict[str, int] = field(default_factory=dict)  # by register
    predicates: dict[str, int] = field(default_factory=dict)
    num_rows: int = 0
    num_predicates: int = 2  # 0 and 1 are false and true
    origin: list[Instr] = field(default_factory=list)  # by instruction
    granule: list[int] = field(default_factory=lambda: [4, 4])  # smallest access by space
    shared_names: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0  # of variables with a size
    #: By instruction, if somebody asks: address of the last access, mask of who executed it.
    seen: np.ndarray | None = None  # uint64 [n, 2]


def decode(entry: Entry) -> Code:
    return Decoder(entry).code


class Decoder:
    def __init__(self, entry: Entry):
        self.entry = entry
        self.code = Code(entry)
        self.rows, self.predicates = self.code.rows, self.code.predicates
        self.made: list[tuple] = []
        self.extra: list[int] = []
        self.sums: set[str] = set()  # registers that tensor cores add up in
        self.left: set[str] = set()  # registers that they read
        self.constants: list[np.ndarray] = []
        self.constant_at: dict[tuple[int, int], int] = {}
        self._registers()
        self._shared()
        starts = []
        for self.instr in entry.instrs:
            starts.append(len(self.made))
            self._decode()
        starts.append(len(self.made))
        self._link(starts)

    # Operands

    def _registers(self) -> None:
        code = self.code
        for name, bits in {**dict.fromkeys(SPECIAL, 32), **self.entry.registers}.items():
            if bits == 1:
                self.predicates[name] = code.num_predicates
                code.num_predicates += 1
            else:
                self.rows[name] = code.num_rows
                code.num_rows += 2 if bits == 64 else 1

    def _shared(self) -> None:
        position = SHARED_BASE
        for name, (size, alignment) in sorted(
            self.entry.shared.items(), key=lambda item: -item[1][0]
        ):
            position = -(-position // alignment) * alignment  # dynamic memory comes last
            self.code.shared_names[name] = position
            position += size
        self.code.shared_bytes = position - SHARED_BASE

    def bits(self, name: str, default: int) -> int:
        return self.entry.registers.get(name, default)

    def row(self, text: str, kind: str) -> int:
        """A register, or a constant as a row of the constant pool (a negative number)."""
        wide = BITS[kind] == 64
        if text in self.rows:
            if (self.bits(text, 32) == 64) != wide:
                raise Unmodelled(f"{text} as {kind}")
            return self.rows[text]
        value = self._value(text)
        key = value % (1 << (64 if wide else 32)), wide
        if key not in self.constant_at:
            self.constant_at[key] = -1 - len(self.constants)
            row = np.full(32, key[0], np.uint64 if wide else np.uint32).view(np.uint32)
            self.constants += list(row.reshape(-1, 32))
        return self.constant_at[key]

    def _value(self, text: str) -> int:
        if text in self.entry.params:
            return PARAM_BASE + self.entry.params[text][0]
        if text in self.code.shared_names:
            return self.code.shared_names[text]
        if text.startswith("0f"):
            return int(text[2:], 16)
        try:
            return int(text, 0)
        except ValueError:
            raise Unmodelled(f"operand {text}") from None

    def registers(self, text: str) -> list[int]:
        """Rows of a vector of registers of 32 bits."""
        rows = [self.row(name, "u32") for name in vector(text)]
        if min(rows) < 0:
            raise Unmodelled("a constant in a vector")
        return rows

    def predicate(self, text: str) -> int:
        """Number of a predicate; of a constant 0 or 1, which never change."""
        if text.startswith("!"):
            number = self._temporary()
            self.emit(
                alu.TABLE["not.pred"].number, d=number, a=self.predicate(text[1:]), guarded=False
            )
            return number
        if text in self.predicates:
            return self.predicates[text]
        return int(self._value(text) != 0)

    def _temporary(self) -> int:
        self.code.num_predicates += 1
        return self.code.num_predicates - 1

    def target(self, text: str, kind: str) -> int | None:
        """The register of a result, or None for nobody's."""
        if text == "_":
            return None
        return self.predicate(text) if kind == "pred" else self.row(text, kind)

    def address(self, text: str) -> tuple[int, int, bool]:
        """(row of the base, offset, base has 64 bits)"""
        found = re.fullmatch(r"\[([%\w$@.]+)(?:\+(-?\w+))?\]", text)
        if not found:
            raise Unmodelled(f"address {text}")
        wide = self.bits(found[1], 32) == 64
        return self.row(found[1], "u64" if wide else "u32"), int(found[2] or "0", 0), wide

    def place(self, text: str) -> list[int]:
        """An address as part of a list: row, whether it has 64 bits, offset."""
        row, offset, wide = self.address(text)
        return [row, int(wide), offset]

    # Instructions

    def emit(self, op, d=0, a=0, b=0, c=0, n=0, x=0, flags=0, *, guarded=True) -> None:
        guard = -1
        if guarded and self.instr.guard:
            guard = self.predicate(self.instr.guard)
            flags |= NEGATED if self.instr.negated else 0
        number = NUMBER[op] if isinstance(op, str) else op
        self.made.append((number, flags, guard, d, a, b, c, n, x))
        self.code.origin.append(self.instr)

    def lanes(self, name: str, d: str, *operands: str) -> None:
        """An operation of `alu.TABLE`."""
        operation = alu.TABLE[name]
        target = self.target(d, operation.out)
        if target is None:
            return
        rows, n = [], 0
        for text, kind in zip(operands, operation.ins, strict=True):
            if kind == "number":
                n = int(text, 0)
            else:
                rows.append(self.predicate(text) if kind == "pred" else self.row(text, kind))
        a, b, c = [*rows, 0, 0][:3]
        self.emit(operation.number, target, a, b, c, n)

    def _decode(self) -> None:
        op, args = self.instr.op, self.instr.args
        words = op.split(".")
        try:
            if op in alu.TABLE and not any(
                text[0] in "{%" and self._is_special(text) for text in args
            ):
                return self.lanes(op, *self._compared(args) if words[0] == "setp" else args)
            for name, method in METHODS.items():
                if op.startswith(name):
                    return method(self, words, args)
        except Unmodelled as fault:
            raise self.unmodelled(str(fault)) from None
        except (KeyError, ValueError, IndexError):
            pass
        raise self.unmodelled()

    def unmodelled(self, why: str = "") -> Unmodelled:
        why = f" ({why})" if why else ""
        return Unmodelled(f"PTX line {self.instr.line}, {self.instr.place}: {self.instr}{why}")

    def _is_special(self, text: str) -> bool:
        """A vector, or a register that no instruction writes."""
        return text[0] == "{" or text in ("%globaltimer", "%clock64", "%clock")

    def _compared(self, args: list[str]) -> list[str]:
        if len(args) != 3 or "|" in args[0]:
            raise Unmodelled("setp with more than one result or condition")
        return args

    def compare(self, words, args) -> None:
        """setp with a second condition: setp.lt.and.s32 p, a, b, q."""
        joined = next(word for word in words if word in ("and", "or", "xor"))
        number = self._temporary()
        operation = alu.TABLE[f"setp.{words[1]}.{words[-1]}"]
        rows = [self.row(text, kind) for text, kind in zip(args[1:3], operation.ins, strict=True)]
        self.emit(operation.number, number, *rows, guarded=False)
        other = self.predicate(args[3])
        self.emit(alu.TABLE[f"{joined}.pred"].number, self.predicate(args[0]), number, other)

    def move(self, words, args) -> None:
        d, source = args
        kind = words[-1]
        if source in ("%globaltimer", "%clock64"):
            self.emit("timer", self.row(d, "u64"))
        elif d[0] == "{":
            for i, name in enumerate(vector(d)):
                self.lanes(f"unpack.{kind}.{i}", name, source)
        else:
            self.lanes(f"pack.{kind}.{len(vector(source))}", d, *vector(source))

    def branch(self, words, args) -> None:
        self.emit("bra", x=self.entry.labels[args[0]])

    def leave(self, words, args) -> None:
        self.emit("ret")

    def nothing(self, words, args) -> None:
        self.emit("nop")

    def parameter(self, words, args) -> None:
        found = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", args[1])
        if not found:
            raise Unmodelled(f"parameter {args[1]}")
        name, offset = found.groups()
        size = BITS[words[-1]] // 8
        wide = self.bits(args[0], 32) == 64
        if size != (8 if wide else 4):
            raise Unmodelled(f"{size} bytes")
        self.emit(
            "param", self.rows[args[0]], n=self.entry.params[name][0] + int(offset or 0), x=wide
        )

    def shuffle(self, words, args) -> None:
        d, _, valid = args[0].partition("|")
        a, b, c, members = (self.row(text, "u32") for text in args[1:5])
        valid = self.predicate(valid) if valid and valid != "_" else -1
        self.emit(f"shfl_{words[2]}", self.row(d, "u32"), a, b, c, n=valid, x=members)

    def vote(self, words, args) -> None:
        ballot = words[2] == "ballot"
        d = self.row(args[0], "u32") if ballot else self.predicate(args[0])
        self.emit(f"vote_{words[2]}", d, self.predicate(args[1]), x=self.row(args[2], "u32"))

    def reduce(self, words, args) -> None:
        kind = words[3]
        if kind not in ("s32", "u32"):
            raise Unmodelled(f"redux of {kind}")
        d, a, members = (self.row(text, "u32") for text in args)
        self.emit(f"redux_{words[2]}_{kind[0]}", d, a, x=members)

    def elect(self, words, args) -> None:
        d, _, chosen = args[0].partition("|")
        d = -1 if d == "_" else self.row(d, "u32")
        self.emit("elect", d, n=self.predicate(chosen), x=self.row(args[1], "u32"))

    # Memory

    def memory(self, words, args) -> None:
        """ld and st; n: offset of the address, x: [space, bytes, count, signed, wide, rows ...]."""
        loads = words[0] == "ld"
        values, place = args if loads else args[::-1]
        space, kind = self._space(words), words[-1]
        row, offset, wide = self.address(place)
        names = vector(values)
        size = BITS[kind] // 8
        rows, target = [], False
        for name in names:
            target = self.bits(name, 64 if size == 8 else 32) == 64
            if name == "_":
                raise Unmodelled("an unused part of a vector")
            rows.append(self.row(name, "u64" if target else "u32"))
        self._access(space, size)
        packed = [space, size, len(rows), int(loads and kind[0] == "s"), int(target), *rows]
        flags = self._order(words)
        self.emit(words[0], a=row, b=wide, n=offset, x=self._list(packed), flags=flags)

    def atomic(self, words, args) -> None:
        """atom and red; x: [space, bytes, kind, row of the second operand, whether it reads]."""
        kind = words[-1]
        what = next(word for word in words if word in (*ATOMICS, "min", "max"))
        if what in ("min", "max"):
            what += "_s" if kind[0] == "s" else "_u"
        if kind[0] not in "bus" or BITS[kind] < 32:
            raise Unmodelled(kind)
        d, place, *values = args if words[0] == "atom" else ["_", *args]
        space = self._space(words)
        row, offset, wide = self.address(place)
        rows = [self.row(text, kind) for text in values]
        target = -1 if d == "_" else self.row(d, kind)
        size = BITS[kind] // 8
        self._access(space, size)
        x = self._list([space, size, ATOMICS.index(what), rows[-1], int(words[0] == "atom")])
        self.emit("atom", target, row, wide, rows[0], offset, x, self._order(words, "relaxed"))

    def _space(self, words: list[str]) -> int:
        spaces = [word.partition("::")[0] for word in words]
        if "shared" in spaces:
            return SHARED
        if "global" in spaces:
            return GLOBAL
        raise Unmodelled("a generic address")

    def _access(self, space: int, size: int) -> None:
        self.code.granule[space] = min(self.code.granule[space], size)

    def _order(self, words: list[str], default: str = "") -> int:
        """Flags of a load, store, atomic or fence."""
        semantics = next((word for word in words if word in SEMANTICS), default)
        return SEMANTICS.get(semantics, 0) | (SYSTEM if "sys" in words else 0)

    def _list(self, values: list[int]) -> int:
        self.extra += values
        return len(self.extra) - len(values)

    def _at(self, op: str, place: str, x: int = 0, c: int = 0, d: int = 0) -> None:
        """What begins with an address."""
        row, offset, wide = self.address(place)
        flags = RELAXED if ".relaxed" in self.instr.op else 0
        self.emit(op, d, row, wide, c, offset, x, flags)

    def matrices(self, words, args) -> None:
        """stmatrix and ldmatrix; x: [matrices, transposed, rows ...]"""
        place, names = args if words[0] == "stmatrix" else args[::-1]
        rows = self.registers(names)
        if words[-1] != "b16" or "m8n8" not in words or "shared" not in words:
            raise Unmodelled(words[-1])
        self._at(words[0], place, self._list([len(rows), int("trans" in words), *rows]))

    # Order, barriers, copies, tensor cores

    def fence(self, words, args) -> None:
        self.emit("fence", flags=self._order(words))

    def proxy_fence(self, words, args) -> None:
        """n: 1 for global, 2 for shared memory, 3 for both."""
        spaces = [word.partition("::")[0] for word in words]
        self.emit("fence_proxy", n=1 * ("shared" not in spaces) + 2 * ("global" not in spaces))

    def plain(self, words, args) -> None:
        names = {"bar": "warp_sync", "nanosleep": "sleep"}
        names |= {"wait": "launch_wait", "launch_dependents": "launch_let"}
        self.emit(names.get(words[0]) or names[words[1]])

    def barrier(self, words, args) -> None:
        """n: number, x: threads or 0"""
        number, threads = [*(int(text, 0) for text in args), 0][:2]
        self.emit(f"bar_{words[1]}", n=number, x=threads)

    def mbarrier(self, words, args) -> None:
        """c: count, bytes or parity; the state that nobody uses is left out."""
        action = words[1]
        if action == "init":
            self._at("mbarrier_init", args[0], c=self.row(args[1], "u32"))
        elif action == "arrive":
            name = "mbarrier_expect" if "expect_tx" in words else "mbarrier_arrive"
            self._at(name, args[1], c=self.row(args[2] if len(args) > 2 else "1", "u32"))
        elif action in ("try_wait", "test_wait") and "parity" in words:
            parity, done = self.row(args[2], "u32"), self.predicate(args[0])
            self._at(f"mbarrier_{action[:-5]}", args[1], c=parity, d=done)
        else:
            raise Unmodelled(action)

    def bulk(self, words, args) -> None:
        """cp.async.bulk; lists as in `copies.c`."""
        if words[3] == "commit_group":
            return self.emit("stores_commit")
        if words[3] == "wait_group":  # whoever waits only for reads waits for all
            return self.emit("stores_wait", n=int(args[0], 0))
        if words[3] == "tensor":
            found = re.fullmatch(r"\[([%\w@]+),\s*\{(.*)\}\]", args[1])
            if not found or words[6] != "global" or not words[5].startswith("shared::"):
                raise Unmodelled("a tensor copy from shared memory")
            at = [self.row(text.strip(), "s32") for text in found[2].split(",")]
            x = [self.row(found[1], "u64"), len(at), *at, *self.place(args[2])]
            return self._at("load_tensor", args[0], self._list(x))
        x = [*self.place(args[1]), self.row(args[2], "u32")]
        if words[3].startswith("shared"):
            return self._at("load_bulk", args[0], self._list([*x, *self.place(args[3])]))
        if words[3] != "global":
            raise Unmodelled(words[3])
        self._at("store_bulk", args[0], self._list(x))

    def matrix(self, words, args) -> None:
        """wgmma; a, b: descriptors, c: predicate, x: [kind, columns, rows of the sums, and of A]"""
        if words[1] == "fence":
            return self.emit("mma_fence")
        if words[1] in ("commit_group", "wait_group"):
            return self.emit(f"mma_{words[1][:-6]}", n=int(args[0], 0) if args else 0)
        found = SHAPE.search(self.instr.op)
        if not found or set(args[4:6]) != {"1"} or not set(args[6:]) <= {"0"}:
            raise Unmodelled("a shape, a scale or a transposition")
        sums = self.registers(args[0])
        left = self.registers(args[1]) if args[1][0] == "{" else []
        if len(sums) != int(found[1]) // 2 or len(left) not in (0, 4):
            raise Unmodelled("a number of registers")
        a = NOBODY if left else self.row(args[1], "u64")
        x = self._list([KINDS[found[2] or found[3]], int(found[1]), *sums, *left])
        self.sums |= set(vector(args[0]))
        self.left |= set(vector(args[1]) if left else ())
        self.emit("mma", a=a, b=self.row(args[2], "u64"), c=self.predicate(args[3]), x=x)

    # The end

    def _link(self, starts: list[int]) -> None:
        code = self.code
        made = np.array(self.made, INSTRUCTION)
        branches = np.flatnonzero(made["op"] == NUMBER["bra"])
        made["x"][branches] = [starts[target] for target in made["x"][branches]]
        joins = post_dominators(made)
        for branch in branches.tolist():
            made["n"][branch] = joins[branch]
        self._using(made)
        code.instructions, code.extra = made, np.array([*self.extra, 0], np.int32)
        code.constants = np.array(self.constants or [np.zeros(32)], np.uint32)

    def _using(self, made: np.ndarray) -> None:
        """Mark what writes registers of tensor cores, or reads those that they add up in. Its list:
        [how many it writes, uses, rows ...]
        """
        self.code.uses = np.zeros(len(made), np.int32)
        for index, instr in enumerate(self.code.origin):
            if instr.op.startswith("wgmma"):
                continue
            results = instr.args[:1] if instr.args and instr.args[0][0] != "[" else []
            others = instr.args[len(results) :]
            written, read = (
                [self.rows[name] for name in re.findall(r"%\w[\w@]*", " ".join(args)) if name in of]
                for args, of in ((results, self.sums | self.left), (others, self.sums))
            )
            if written or read:
                made["flags"][index] |= USES_OPERANDS
                used = [len(written), len(written) + len(read), *written, *read]
                self.code.uses[index] = self._list(used)


METHODS = {
    "setp": Decoder.compare, "mov": Decoder.move, "bra": Decoder.branch, "ret": Decoder.leave,
    "exit": Decoder.leave, "ld.param": Decoder.parameter, "shfl.sync": Decoder.shuffle,
    "vote.sync": Decoder.vote, "redux.sync": Decoder.reduce, "elect.sync": Decoder.elect,
    "ldmatrix": Decoder.matrices, "ld": Decoder.memory,
    "stmatrix": Decoder.matrices, "st": Decoder.memory,
    "atom": Decoder.atomic, "red": Decoder.atomic,
    **dict.fromkeys(NOTHING, Decoder.nothing),
    "fence.proxy.async": Decoder.proxy_fence, "fence.acq_rel": Decoder.fence,
    "bar.warp.sync": Decoder.plain, "bar.sync": Decoder.barrier, "bar.arrive": Decoder.barrier,
    "mbarrier": Decoder.mbarrier, "cp.async.bulk": Decoder.bulk, "wgmma": Decoder.matrix,
    "nanosleep": Decoder.plain, "griddepcontrol": Decoder.plain,
}  # fmt: skip


def vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


def post_dominators(made: np.ndarray) -> dict[int, int]:
    """By conditional branch: the instruction where both its ways meet again."""
    last, op = len(made), made["op"]
    follow: list[tuple[int, ...]] = []
    for index in range(last):
        if op[index] == NUMBER["bra"]:
            target = int(made["x"][index])
            follow.append((target, index + 1) if made["guard"][index] >= 0 else (target,))
        else:
            follow.append((last,) if op[index] == NUMBER["ret"] else (index + 1,))
    before: list[list[int]] = [[] for _ in range(last + 1)]
    for index, nexts in enumerate(follow):
        for following in nexts:
            before[following].append(index)
    order, seen, todo = [], {last}, [(last, iter(before[last]))]  # from the exit backwards
    while todo:
        node, rest = todo[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                todo.append((other, iter(before[other])))
                break
        else:
            order.append(node)
            todo.pop()
    rank = {node: place for place, node in enumerate(order)}
    found = {last: last}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            new = None
            for other in follow[node]:
                if other not in found:
                    continue
                if new is None:
                    new = other
                while new != other:  # up the tree to where both meet
                    if rank[new] < rank[other]:
                        new = found[new]
                    else:
                        other = found[other]
            if new is not None and found.get(node) != new:
                found[node], changed = new, True
    return {i: found.get(i, last) for i in range(last) if op[i] == NUMBER["bra"]}
