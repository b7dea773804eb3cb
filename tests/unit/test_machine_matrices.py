"""Tensor cores with A in registers, matrices in shared memory, lop3, bit fields: both engines
against numpy.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megamoe.compile import cache_dir
from megamoe.dsl import HAVE_DSL
from megamoe.machine import alu, ptx, sums
from megamoe.machine.decode import Unmodelled, decode
from megamoe.machine.machine import Machine
from megamoe.machine.reference import Reference, values

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = """
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(.param .u64 in, .param .u64 out)
.reqntid {threads}, 1, 1
{{
.reg .pred %p<2>; .reg .b32 %r<20>; .reg .b64 %rd<6>; .reg .b32 %d<128>; .reg .b32 %a<8>;
ld.param.b64 %rd0, [in]; ld.param.b64 %rd1, [out]; mov.u32 %r0, %tid.x;
mul.wide.u32 %rd2, %r0, 16; add.s64 %rd2, %rd0, %rd2; shl.b32 %r1, %r0, 4; add.s32 %r1, %r1, smem;
{body}
ret;
}}
"""


def code_of(body: str, threads: int = 32):
    return decode(next(iter(ptx.parse(HEAD.format(body=body, threads=threads)).values())))


def outcome(body: str, given: np.ndarray, words: int, threads: int = 32) -> np.ndarray:
    """What a program makes of its input: words of each thread, which both engines agree on."""
    source, code = torch.from_numpy(np.ascontiguousarray(given)), code_of(body, threads)
    found = []
    for checks in (True, False, None):  # None: the reference
        out = torch.zeros(threads, words, dtype=torch.int32)
        machine = Machine(cache_dir(), checks=bool(checks))
        machine.memory.add("in", source)
        machine.memory.add("out", out)
        places = (tensor.data_ptr().to_bytes(8, "little") for tensor in (source, out))
        machine.launch(code, 1, b"".join(places), 64 << 10)
        if checks is None:
            reference = Reference(machine.memory)
            machine.onto(reference)
            reference.run()
        else:
            machine.run()
        found.append(out.numpy().view(np.uint32))
    assert all(np.array_equal(other, found[0]) for other in found)
    return found[0]


def keep(names: list[str]) -> str:
    """Each thread writes its registers."""
    lines = [f"mad.wide.u32 %rd3, %r0, {4 * len(names)}, %rd1;"]
    return "\n".join(
        lines + [f"st.global.b32 [%rd3+{4 * i}], {name};" for i, name in enumerate(names)]
    )


def listed(name: str, count: int, first: int = 0) -> str:
    return f"{{{', '.join(f'%{name}{first + i}' for i in range(count))}}}"


def test_lop3_is_what_its_table_says():
    """The table of an expression is the expression of the tables of a, b and c."""
    expressions = [lambda a, b, c: a & b | c, lambda a, b, c: a ^ b ^ ~c, lambda a, b, c: ~a & c,
                   lambda a, b, c: (a & b) | (~a & c)]  # fmt: skip
    rng = np.random.default_rng(0)
    given = rng.integers(0, 1 << 32, (32, 4), np.uint32)
    body = f"ld.global.v4.b32 {listed('a', 4)}, [%rd2];"
    for i, expression in enumerate(expressions):
        body += f"lop3.b32 %d{i}, %a0, %a1, %a2, {expression(0xF0, 0xCC, 0xAA) & 255};"
    found = outcome(body + keep([f"%d{i}" for i in range(4)]), given, 4)
    for i, expression in enumerate(expressions):
        assert np.array_equal(found[:, i], expression(*given.T[:3]))
    assert alu.TABLE["lop3.b32"].ins[3] == "number"


FIELDS = [(3, 8), (0, 32), (0, 1), (31, 1), (28, 8), (32, 4), (40, 1), (5, 0), (0, 255), (256, 257)]


@pytest.mark.parametrize("sign", "us")
def test_fields_of_bits(sign):
    """What lies above the word is zeros or its sign; of places and lengths 8 bits count."""
    given = np.random.default_rng(0).integers(0, 1 << 32, (32, 4), np.uint32)
    body = f"ld.global.v4.b32 {listed('a', 4)}, [%rd2];"
    for i, (place, length) in enumerate(FIELDS):
        body += f"bfe.{sign}32 %d{i}, %a0, {place}, {length};"
    found = outcome(body + keep([f"%d{i}" for i in range(len(FIELDS))]), given, len(FIELDS))
    for i, (place, length) in enumerate(FIELDS):
        place, length = place & 255, length & 255
        for word, got in zip(given[:, 0].tolist(), found[:, i].tolist(), strict=True):
            value = (word - (word >> 31 << 32) * (sign == "s")) >> place
            value &= (1 << length) - 1
            if sign == "s" and length and value >> (length - 1):
                value -= 1 << length
            assert got == value & 0xFFFFFFFF


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_in_shared_memory(count, transposed):
    """Rows lie 48 bytes apart, in the opposite order of the lanes; the loads are not transposed."""
    given = np.random.default_rng(count).integers(0, 1 << 32, (32, 4), np.uint32)
    names = listed("a", count)
    body = f"""ld.global.v4.b32 {listed("a", 4)}, [%rd2];
        sub.s32 %r2, 31, %r0; mad.lo.s32 %r2, %r2, 48, smem;
        stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r2], {names};
        bar.warp.sync -1; mov.b32 %d0, %r2;
        ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {listed("d", count)}, [%d0];
        ldmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {listed("d", count, 4)}, [%r2];
        setp.lt.u32 %p0, %r0, {8 * count}; bar.warp.sync -1;
        @%p0 ld.shared.v4.b32 {listed("d", 4, 8)}, [%r2];"""
    parts = ((0, count), (4, count), (8, 4))
    kept = [f"%d{first + i}" for first, size in parts for i in range(size)]
    found = outcome(body + keep(kept), given, len(kept))
    matrices = np.ascontiguousarray(given.T[:count]).view(np.uint16).reshape(count, 8, 8)
    stored = matrices.swapaxes(1, 2) if transposed else matrices
    rows = np.ascontiguousarray(found[: 8 * count, -4:]).view(np.uint16)
    assert np.array_equal(rows, stored.reshape(-1, 8))
    for at, expected in ((0, stored), (count, stored.swapaxes(1, 2))):
        loaded = np.ascontiguousarray(found.T[at : at + count]).view(np.uint16).reshape(-1, 8, 8)
        assert np.array_equal(loaded, expected)


SHAPES = {"e4m3": "k32.f32.e4m3.e4m3", "bf16": "k16.f32.bf16.bf16"}
CHUNK, ROW = np.arange(8), np.arange(8)[:, None]


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Bytes [n, 64] as they lie in shared memory with rows of 128 bytes."""
    tile = np.zeros((len(rows) // 8, 8, 8, 16), np.uint8)
    tile[:, :, :4] = rows.reshape(-1, 8, 4, 16)
    return tile[:, ROW, CHUNK ^ ROW]


def in_rows(sums: np.ndarray) -> np.ndarray:
    """[128 threads, N / 2] -> [64, N]: lane 4 g + t has pair t of each 8 columns."""
    parts = sums.reshape(4, 8, 4, sums.shape[1] // 4, 2, 2)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(64, -1)


def products(kind: str, columns: int, left: np.ndarray, right: np.ndarray, of_registers: bool):
    """Sums of two instructions, of A [64, 64] and B [N, 64] bytes: float32 [64, N]."""
    size, scales = 128 * (64 + columns), "1, 1" + ", 0" * (kind == "bf16")
    given = [*map(swizzled, (left, right)), left]
    body = "shl.b32 %r2, %r0, 4;"
    for at in range(0, size, 2048):
        body += f"""setp.lt.u32 %p0, %r2, {size - at};
            @%p0 ld.global.v4.b32 {listed("a", 4)}, [%rd2+{at}];
            @%p0 st.shared.v4.b32 [%r1+{at}], {listed("a", 4)};"""
    # Register i: row 16 w + g + 8 (i % 2), bytes 4 t + 16 (i / 2) of an instruction's 32.
    body += """shr.u32 %r3, %r0, 5; shl.b32 %r3, %r3, 4; and.b32 %r4, %r0, 31; shr.u32 %r5, %r4, 2;
        add.s32 %r3, %r3, %r5; and.b32 %r4, %r0, 3; shl.b32 %r3, %r3, 6;
        mad.lo.s32 %r3, %r4, 4, %r3; mad.wide.u32 %rd3, %r3, 1, %rd0;"""
    for i in range(8):
        at = size + 512 * (i % 2) + 16 * (i % 4 // 2) + 32 * (i // 4)
        body += f"ld.global.b32 %a{i}, [%rd3+{at}];"
    body += """fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
        setp.ne.s32 %p0, 0, 0; setp.eq.s32 %p1, 0, 0;"""
    for step in range(2):
        a, b = (0x4000004000010000 | (1024 + at >> 4) + 2 * step for at in (0, 8192))
        operand = listed("a", 4, 4 * step) if of_registers else "%rd4"
        body += f"""mov.b64 %rd4, {a}; mov.b64 %rd5, {b};
            wgmma.mma_async.sync.aligned.m64n{columns}{SHAPES[kind]}
            {listed("d", columns // 2)}, {operand}, %rd5, %p{step}, {scales};"""
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    body += keep([f"%d{i}" for i in range(columns // 2)])
    data = np.concatenate([part.reshape(-1) for part in given])
    return in_rows(outcome(body, data, columns // 2, threads=128).view(np.float32))


def stored(numbers: np.ndarray, kind: str) -> np.ndarray:
    """As operand bytes."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn
    tensor = torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).to(dtype)
    return tensor.view(torch.uint8).numpy()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("columns", [8, 24, 136, 256])
def test_products_with_a_in_registers(kind, columns):
    """Small integers have exact sums; others those of the model, as with A in shared memory."""
    rng, depth = np.random.default_rng(columns), 64 if kind == "e4m3" else 32
    left, right = (rng.integers(-4, 5, (n, depth)) for n in (64, columns))
    found = products(kind, columns, stored(left, kind), stored(right, kind), True)
    assert np.array_equal(found, (left @ right.T).astype(np.float32))
    left, right = (
        stored(rng.normal(size=(n, depth)) * 2.0 ** rng.integers(-6, 5, (n, 1)), kind)
        for n in (64, columns)
    )
    found = products(kind, columns, left, right, True)
    expected = np.zeros((64, columns), np.float32)
    for part in (slice(0, 32), slice(32, 64)):
        operands = (values(rows[:, part], kind) for rows in (left, right))
        expected = sums.add(kind, *operands, expected)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    if columns in (8, 24):
        assert np.array_equal(found, products(kind, columns, left, right, False))


@pytest.mark.parametrize(
    "instruction",
    [
        "prmt.b32.f4e %r0, %r1, %r2, %r3;",
        "lop3.or.b32 %r0|%p0, %r1, %r2, %r3, 1, %p1;",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32 {%r0}, [%r1];",
        "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r1], {%r0};",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, "
        "{%a0, %a1, %a2, %a3}, %rd0, 1, 1, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%d0, %d1, %d2, %d3}, "
        "{%a0, %a1, %a2, %a3}, %rd0, 1;",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%d0, %d1, %d2, %d3}, "
        "{%a0, %a1, %a2, 0}, %rd0, 1, 1, 1;",
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_named(instruction):
    with pytest.raises(Unmodelled) as error:
        code_of(instruction)
    assert instruction.split()[0] in str(error.value)


@pytest.mark.compile
@pytest.mark.skipif(not HAVE_DSL, reason="the kernel is built here")
@pytest.mark.parametrize("columns", [8, 64])
def test_a_kernel_that_dequantises_into_registers(columns, tmp_path):
    """All sums are exact: small numbers."""
    from tests.unit.register_kernel import ARGUMENTS, DEPTH, build

    rng = torch.Generator().manual_seed(columns)
    nibbles = torch.randint(0, 8, (64, DEPTH), generator=rng)
    x = torch.randint(-4, 5, (columns, DEPTH), generator=rng).to(torch.float8_e4m3fn)
    # Row 16 w + 8 h + g, column 32 k + 16 j + 4 t + b: nibble 4 h + b of word 2 k + j of a thread.
    order = nibbles.view(4, 2, 8, 4, 2, 4, 4).permute(0, 2, 5, 3, 4, 1, 6).reshape(128, 8, 8)
    codes = (order << 4 * torch.arange(8)).sum(-1).to(torch.int32)
    sums = torch.full((128, columns // 2), float("nan"))
    kernel = build(columns, tmp_path)
    machine = Machine(cache_dir(), checks=True, policy="tardy")
    given = dict(zip((name for name, _ in ARGUMENTS), (codes, x, sums), strict=False))
    for name, tensor in given.items():
        machine.memory.add(name, tensor)
    kernel.launches.on_launch = machine.launch
    kernel.launcher()(0, **{name: tensor.data_ptr() for name, tensor in given.items()})
    kernel.launches.check()
    machine.run()
    weights = torch.tensor([0.5, 1, 1.5, 2, -0.5, -1, -1.5, -2])[nibbles]
    assert torch.equal(torch.from_numpy(in_rows(sums.numpy())), weights @ x.float().T)
