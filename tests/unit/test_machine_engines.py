"""The C core against the reference, instruction by instruction: kernels and random programs."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from megamoe.compile import cache_dir
from megamoe.machine import alu, core, ptx
from megamoe.machine.decode import decode
from megamoe.machine.machine import Machine, Warp
from megamoe.machine.reference import BLOCKED, ENDED, Reference
from tests.machine import Layer
from tests.nights import at_night

pytestmark = pytest.mark.usefixtures("one_thread")


class Lockstep:
    """A machine and a reference on the same memory: the reference says what it would store, the
    core does it.
    """

    def __init__(self, machine: Machine):
        self.machine, self.library = machine, machine.core
        machine.make()
        self.library.begin(machine.c)
        self.reference, self.stored = Reference(machine.memory), []
        self.reference.stores = lambda address, data: self.stored.append((address, data))
        machine.onto(self.reference)
        self.pairs = [(warp, self._twin(warp)) for warp in self.reference.warps]

    def _twin(self, warp) -> Warp:
        pointer = ctypes.POINTER(core.CWarp)()
        place = warp.cta.rank, warp.cta.index, warp.index
        self.library.running(self.machine.c, *place, ctypes.byref(pointer))
        state = core.CWarp.from_address(ctypes.addressof(pointer.contents))
        return Warp(self.machine, *place, state)

    def run(self, seed: int) -> int:
        """Warps in turns by seed; how many instructions were compared."""
        rng, steps = random.Random(seed), 0
        while self.pairs:
            pair = rng.choice([pair for pair in self.pairs if not pair[1].state.blocked])
            warp, twin = pair
            if warp.waits is not None:  # the core is behind a barrier at which the reference is
                warp.step()
            for _ in range(rng.randint(1, 300)):
                steps += 1
                status = self.step(warp, twin)
                if status == ENDED:
                    self.pairs.remove(pair)
                if status in (ENDED, BLOCKED):
                    break
            else:
                shared = warp.cta.shared[: self.machine.shared_end], twin.shared()
                assert np.array_equal(shared[0][1024:], shared[1][1024:])
                assert np.array_equal(warp.rows, twin.rows())
        return steps

    def step(self, warp, twin) -> str:
        instr, number = warp.code.origin[warp.pc], warp.pc
        self.stored.clear()
        status = warp.step()
        done = self.library.step(self.machine.c, twin.state)
        where = f"{instr} (PTX {instr.line})"
        expected = {ENDED: (4,), BLOCKED: (3,)}.get(status, (0, 1, 2))
        assert done in expected, (where, done, twin.state.fault)
        if status == ENDED:
            return status
        for address, data in self.stored:
            assert self.machine.memory.at(address, len(data)).tobytes() == data, where
        if status != BLOCKED:
            assert (warp.pc, warp.mask) == (twin.state.pc, twin.state.mask), where
            count = len(warp.predicates)
            mine = (ctypes.c_uint32 * count).from_address(twin.state.predicates)
            assert warp.predicates == list(mine), where
            row = int(warp.code.instructions["d"][number])
            if 0 <= row < len(warp.rows):
                assert np.array_equal(warp.rows[row : row + 2], twin.rows()[row : row + 2]), where
        return status


@pytest.mark.parametrize(
    "precision",
    ["bf16", *(at_night(p) for p in ("fp8_block", "fp8_channel"))],
)
def test_every_instruction_of_a_kernel(precision, monkeypatch):
    """Also with one clamp, masked slots and 32-bit ids."""
    layer = Layer(
        1, 3, experts=2, precision=precision, num_ctas=1, clamp=0.5, checks=False, policy="eager"
    )
    xs, idx, weights = layer.inputs("masked", 1)
    steps = []
    monkeypatch.setattr(Machine, "run", lambda machine: steps.append(Lockstep(machine).run(3)))
    monkeypatch.setattr(Machine, "remote_bytes", 0)
    inputs = xs, [rows.int() for rows in idx], weights
    layer.compare(layer.forward(inputs), inputs)
    assert steps[0] > 20_000


def test_the_reference_runs_a_launch(monkeypatch):
    layer = Layer(1, 3, experts=2, num_ctas=1, checks=False, policy="eager")
    monkeypatch.setattr(core, "library", lambda *_: None)
    layer.check("uniform", 0)


# Random programs


def operand(rng: random.Random, kind: str, registers: dict[str, list[str]]) -> str:
    if kind == "number":
        return str(rng.randrange(256))
    if kind == "pred" or rng.random() < 0.8:
        return rng.choice(registers[CLASS[kind]])
    if kind == "f32":
        return f"0f{rng.choice(WORDS):08X}"
    return str(rng.choice(WORDS) & 0xFFFF)


CLASS = {
    kind: "%rd" if kind[1:] == "64" else "%p" if kind == "pred" else "%r" for kind in alu.DTYPES
}
CLASS |= {"u16": "%rs", "s16": "%rs", "number": "%r"}
WORDS = [0, 1, 2, 31, 32, 0x7F, 0x80, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000,
         0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x80000001, 0x42280000,
         0x43E00000, 0xC3E80001, 0x3C000000, 0x39800000, 0x3A400000, 0x7F7FFFFF]  # fmt: skip
#: Names of `alu.TABLE` that PTX spells in another way.
SPELLED = ("pack", "unpack")


def random_program(seed: int, length: int = 400) -> str:
    """Operations of the table on registers full of awkward values, with guards, branches, shared
    memory, shuffles and votes.
    """
    rng = random.Random(seed)
    counts = {"%p": 6, "%rs": 6, "%r": 12, "%rd": 8}
    registers = {name: [f"{name}{i}" for i in range(n)] for name, n in counts.items()}
    kinds = {"%p": "pred", "%rs": "b16", "%r": "b32", "%rd": "b64"}
    lines = [f".reg .{kinds[name]} {name}<{n}>;" for name, n in counts.items()]
    lines += [".reg .b32 %a; mov.u32 %a, %laneid; shl.b32 %a, %a, 4; add.s32 %a, %a, smem;"]
    lines += [".reg .b32 %s<4>; mov.u32 %s0, %laneid;"]
    for name in registers["%r"]:
        lines.append(f"mad.lo.s32 {name}, %s0, {rng.choice(WORDS)}, {rng.choice(WORDS)};")
    for name in registers["%rd"]:
        lines.append(f"mul.wide.u32 {name}, {rng.choice(registers['%r'])}, {rng.choice(WORDS)};")
    for i, name in enumerate(registers["%rs"]):
        lines.append(f"cvt.u16.u32 {name}, %r{i};")
    for i, name in enumerate(registers["%p"]):
        lines.append(f"setp.lt.s32 {name}, %r{i}, %r{i + 1};")
    names = [name for name in alu.TABLE if not name.startswith(SPELLED)]
    for number in range(length):
        name = rng.choice(names)
        operation = alu.TABLE[name]
        where = [CLASS[kind] for kind in (operation.out, *operation.ins)]
        if name.startswith(("cvt", "mad.wide", "mul")) and not all(map(registers.get, where)):
            continue
        d = rng.choice(registers[where[0]])
        arguments = ", ".join([d, *(operand(rng, kind, registers) for kind in operation.ins)])
        guard = rng.choice(["", "", f"@{rng.choice(['', '!'])}%p{rng.randrange(6)} "])
        lines.append(f"{guard}{name} {arguments};")
        r, p = (lambda: rng.choice(registers["%r"])), f"%p{rng.randrange(6)}"
        if number % 16 == 0:
            mode = rng.choice(["idx", "up", "down", "bfly"])
            clamp = rng.choice([0, 31, 0x1C03 if mode != "up" else 0x1C00])
            lines.append(
                f"shfl.sync.{mode}.b32 {r()}|{p}, {r()}, {rng.randrange(32)}, {clamp}, -1;"
            )
            lines.append(
                f"vote.sync.{rng.choice(['any', 'all'])}.pred {p}, %p{rng.randrange(6)}, -1;"
            )
            lines.append(
                f"vote.sync.ballot.b32 {r()}, %p{rng.randrange(6)}, -1; elect.sync _|{p}, -1;"
            )
            kind = rng.choice(["max.s32", "min.s32", "max.u32", "min.u32"])
            lines.append(f"redux.sync.{kind} {r()}, {r()}, -1;")
            lines.append(
                f"{guard}st.shared.v2.b32 [%a], {{{r()}, {r()}}}; "
                f"{guard}st.shared.b8 [%a+9], {r()};"
            )
            lines.append(f"ld.shared.s16 {r()}, [%a+2]; ld.shared.u8 {r()}, [%a+9];")
            kind = rng.choice(["add.u32", "min.s32", "max.u32", "or.b32", "exch.b32", "xor.b32"])
            lines.append(f"{guard}atom.shared.{kind} {r()}, [smem+768], {r()};")
        if number % 32 == 0:
            lines.append(
                f"@{p} bra $E{number}; {r().join(['add.s32 ', ', '])}{r()}, 3; $E{number}:"
            )
    body = "\n".join(lines)
    return (
        ".extern .shared .align 1024 .b8 smem[];\n.visible .entry k()\n"
        f".reqntid 32, 1, 1\n{{\n{body}\nret;\n}}\n"
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_programs(seed):
    (entry,) = ptx.parse(random_program(seed)).values()
    machine = Machine(cache_dir())
    machine.launch(decode(entry), 1, b"", 1024)
    assert Lockstep(machine).run(0) > 400


def test_every_operation_is_tried():
    """By the random programs together."""
    text = "".join(random_program(seed) for seed in range(20))
    missing = [
        name for name in alu.TABLE if f"{name} " not in text and not name.startswith(SPELLED)
    ]
    assert len(missing) < 12, missing


def test_memory_is_named_where_it_is_not_mapped():
    machine = Machine(cache_dir())
    tensor = torch.zeros(16, dtype=torch.int32)
    machine.memory.add("x", tensor)
    assert machine.memory.describe(tensor.data_ptr() + 8) == "x + 8"
    assert machine.memory.describe(tensor.data_ptr() + 64) == "x + 64 (beyond its end)"
