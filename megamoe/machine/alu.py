"""What one lane computes: a table of PTX operations as typed expressions.

An expression over a, b, c is valid in C and in numpy, so the table is both engines' arithmetic: the
C core is compiled with `c_cases`, the reference evaluates `Operation.compute`. Where the languages
differ the expression calls a function that has one form here and one in `lanes.h`.

A register of up to 32 bits is a row of 32 uint32, one of 64 bits a row of uint64, a predicate a
mask with a bit per lane; n is a number that is part of the instruction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

DTYPES = {
    "u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16, "u32": np.uint32,
    "s32": np.int32, "u64": np.uint64, "s64": np.int64, "f32": np.float32, "pred": np.bool_,
}  # fmt: skip
QUIET_NAN = np.uint32(0x7FFFFFFF)


@dataclass(frozen=True)
class Operation:
    """`number` is that of its case in the C core."""

    number: int
    out: str
    ins: tuple[str, ...]
    expression: str

    def compute(self, *operands: np.ndarray) -> np.ndarray:
        names = dict(zip("abcn", operands, strict=False))
        with np.errstate(all="ignore"):
            result = eval(self.expression, globals(), names)
        if self.out == "f32":  # every NaN is the same one
            result = np.where(result != result, QUIET_NAN, bits_of(result)).view(np.float32)
        return result


def _integers() -> Iterator[tuple[str, str, str, str]]:
    """(PTX operations, out, ins, expression)"""
    for n in (16, 32, 64):
        u, s, last = f"u{n}", f"s{n}", n - 1
        for name, sign in (("add", "+"), ("sub", "-")):
            yield f"{name}.u{n} {name}.s{n}", u, f"{u} {u}", f"a {sign} b"
        yield f"mul.lo.u{n} mul.lo.s{n}", u, f"{u} {u}", "a * b"
        yield f"mad.lo.u{n} mad.lo.s{n}", u, f"{u} {u} {u}", "a * b + c"
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            yield f"{name}.b{n}", u, f"{u} {u}", f"a {sign} b"
        yield f"not.b{n}", u, u, "~a"
        yield f"neg.s{n}", u, u, "0 - a"
        yield f"abs.s{n}", s, s, "select(a < 0, -a, a)"
        yield f"shl.b{n}", u, f"{u} u32", f"select(b < {n}, a << (b & {last}), 0)"
        yield f"shr.u{n} shr.b{n}", u, f"{u} u32", f"select(b < {n}, a >> (b & {last}), 0)"
        yield f"shr.s{n}", s, f"{s} u32", f"a >> to_s{n}(select(b < {last}, b, {last}))"
        for t in (u, s):
            yield f"min.{t}", t, f"{t} {t}", "select(a < b, a, b)"
            yield f"max.{t}", t, f"{t} {t}", "select(a > b, a, b)"
        names = f"selp.b{n} selp.u{n} selp.s{n}" + " selp.f32" * (n == 32)
        yield names, u, f"{u} {u} pred", "select(c, a, b)"
        if n < 64:
            for sign in "us":
                t, wide = f"{sign}{n}", f"{sign}{2 * n}"
                yield f"mul.wide.{t}", wide, f"{t} {t}", f"to_{wide}(a) * to_{wide}(b)"
                yield f"mad.wide.{t}", wide, f"{t} {t} {wide}", f"to_{wide}(a) * to_{wide}(b) + c"
                yield f"mul.hi.{t}", t, f"{t} {t}", f"to_{wide}(a) * to_{wide}(b) >> {n}"
    for t in ("u32", "s32"):
        yield f"div.{t}", t, f"{t} {t}", "quotient(to_s64(a), to_s64(b))"
        yield f"rem.{t}", t, f"{t} {t}", "remainder(to_s64(a), to_s64(b))"
    for name in ("popc", "clz", "brev"):
        yield f"{name}.b32", "u32", "u32", f"{name}(a)"
    yield "bfe.u32", "u32", "u32 u32 u32", "field(a, b, c)"
    yield "bfe.s32", "s32", "s32 u32 u32", "signed_field(a, b, c)"
    yield "prmt.b32", "u32", "u32 u32 u32", "prmt(a, b, c)"
    yield "lop3.b32", "u32", "u32 u32 u32 number", "lop3(a, b, c, n)"


def _moves() -> Iterator[tuple[str, str, str, str]]:
    yield "mov.b16 mov.u16 mov.b32 mov.u32 mov.s32 mov.f32", "u32", "u32", "a"
    yield "mov.b64 mov.u64 mov.s64 cvta.param.u64", "u64", "u64", "a"
    for space in ("shared", "to.shared::cluster", "to.shared", "global", "to.global"):
        yield f"cvta.{space}.u64", "u64", "u64", "a"
    yield "pack.b32.2", "u32", "u32 u32", "a | b << 16"
    yield "pack.b64.2", "u64", "u32 u32", "to_u64(a) | to_u64(b) << 32"
    yield "unpack.b32.0", "u32", "u32", "a & 65535"
    yield "unpack.b32.1", "u32", "u32", "a >> 16"
    yield "unpack.b64.0", "u32", "u64", "to_u32(a)"
    yield "unpack.b64.1", "u32", "u64", "to_u32(a >> 32)"
    types = [f"{sign}{n}" for sign in "us" for n in (8, 16, 32, 64)]
    for to in types:
        for source in types:
            if int(to[1:]) == 8:  # in a register of 16 bits
                wide = f"{to[0]}16"
                yield f"cvt.{to}.{source}", wide, source, f"to_{wide}(to_{to}(a))"
            else:
                yield f"cvt.{to}.{source}", to, source, f"to_{to}(a)"


def _floats() -> Iterator[tuple[str, str, str, str]]:
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        yield f"{name}.f32 {name}.rn.f32", "f32", "f32 f32", f"a {sign} b"
    yield "div.rn.f32", "f32", "f32 f32", "a / b"
    yield "rcp.rn.f32", "f32", "f32", "to_f32(1) / a"
    yield "fma.rn.f32", "f32", "f32 f32 f32", "fused(a, b, c)"
    yield "neg.f32", "u32", "u32", "a ^ 2147483648"
    yield "abs.f32", "u32", "u32", "a & 2147483647"
    for name in ("min", "max"):
        yield f"{name}.f32", "f32", "f32 f32", f"{name}imum(a, b)"
        yield f"{name}.NaN.f32", "f32", "f32 f32", f"{name}imum_nan(a, b)"
    yield "ex2.approx.ftz.f32", "f32", "f32", "ex2(a)"
    yield "rcp.approx.ftz.f32", "f32", "f32", "rcp(a)"
    yield "rsqrt.approx.ftz.f32", "f32", "f32", "rsqrt(a)"
    for source in ("s32", "u32", "s64"):
        yield f"cvt.rn.f32.{source}", "f32", source, "to_f32(a)"
    yield "cvt.rn.bf16.f32", "u32", "f32", "bf16(a)"
    yield "cvt.rn.bf16x2.f32", "u32", "f32 f32", "bf16(a) << 16 | bf16(b)"
    yield "cvt.f32.bf16", "u32", "u32", "a << 16"
    yield "cvt.rn.satfinite.e4m3x2.f32", "u32", "f32 f32", "e4m3(a) << 8 | e4m3(b)"


def _comparisons() -> Iterator[tuple[str, str, str, str]]:
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for n in (16, 32, 64):
        for name, sign in signs.items():
            for t in "us":
                yield f"setp.{name}.{t}{n}", "pred", f"{t}{n} {t}{n}", f"a {sign} b"
            yield f"setp.{name}.b{n}", "pred", f"u{n} u{n}", f"a {sign} b"
        unsigned = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
        for name, sign in unsigned.items():
            yield f"setp.{name}.u{n}", "pred", f"u{n} u{n}", f"a {sign} b"
    opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<", "equ": ""}
    for name, sign in signs.items():
        ordered = f"a {sign} b" if name != "ne" else "(a < b) | (a > b)"
        yield f"setp.{name}.f32", "pred", "f32 f32", ordered
    for name, sign in opposite.items():
        unordered = f"(a {sign} b) == 0" if sign else "((a < b) | (a > b)) == 0"
        yield f"setp.{name}.f32", "pred", "f32 f32", unordered
    yield "setp.neu.f32", "pred", "f32 f32", "a != b"
    yield "setp.nan.f32", "pred", "f32 f32", "(a != a) | (b != b)"
    yield "setp.num.f32", "pred", "f32 f32", "(a == a) & (b == b)"
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        yield f"{name}.pred", "pred", "pred pred", f"a {sign} b"
    yield "not.pred", "pred", "pred", "~a"
    yield "mov.pred", "pred", "pred", "a"


def _table() -> dict[str, Operation]:
    table: dict[str, Operation] = {}
    numbers: dict[tuple, Operation] = {}
    for rows in (_integers(), _moves(), _floats(), _comparisons()):
        for names, out, ins, expression in rows:
            key = out, tuple(ins.split()), expression
            operation = numbers.setdefault(key, Operation(len(numbers), *key))
            table |= dict.fromkeys(names.split(), operation)
    return table


#: By the name of the operation in PTX.
TABLE = _table()
OPERATIONS = list({operation.number: operation for operation in TABLE.values()}.values())


def c_cases() -> str:
    """A case per operation for the C core's switch."""
    lines = []
    for operation in OPERATIONS:
        text, masks, out = operation.expression, "", operation.out
        whole = {out, *operation.ins} == {"pred"}  # all lanes at once
        for name, kind in zip("abcn", operation.ins, strict=False):
            text = re.sub(rf"\b{name}\b", f"q{name}" if whole else f"IN({kind}, {name})", text)
            if kind == "pred":
                masks += f"u32 q{name} = w->predicates[i->{name}]; "
        lines.append(
            f"case {operation.number}: {{ {masks}OUT_{'mask' if whole else out}({text}) }} break;"
        )
    return "\n".join(lines)


# The functions of the expressions

select = np.where
for _name, _dtype in DTYPES.items():
    globals()[f"to_{_name}"] = lambda value, dtype=_dtype: np.asarray(value).astype(dtype)


def bits_of(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float32).view(np.uint32)


def quotient(a, b):
    """Rounded towards zero; all ones for a division by zero."""
    result = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -result, result))


def remainder(a, b):
    return np.where(b == 0, a, a - quotient(a, b) * b)


def popc(a):
    return np.bitwise_count(a).astype(np.uint32)


def clz(a):
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def brev(a):
    bits = np.unpackbits(a.astype("<u4").reshape(-1, 1).view(np.uint8), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view("<u4").reshape(a.shape)


def prmt(a, b, selector):
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(pool)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i) & 15).astype(np.uint64)
        byte = pool >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        signs = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(pick & np.uint64(8), signs, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def lop3(a, b, c, table):
    """Bit 4 a + 2 b + c of the table, bit by bit."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def field(a, position, length):
    """Bits of a from a position on, zeros above."""
    position, length = position & 255, length & 255
    bits = np.where(position < 32, a >> np.minimum(position, 31), 0)
    mask = (np.uint64(1) << np.minimum(length, 32).astype(np.uint64)) - np.uint64(1)
    return (bits & mask).astype(np.uint32)


def signed_field(a, position, length):
    """The same with the sign of its highest bit above."""
    position, length = position & 255, length & 255
    room = np.where(length < 32, 32 - np.maximum(length, 1), 0).astype(np.int32)
    bits = a >> np.minimum(position, 31).astype(np.int32)
    return np.where(length, bits << room >> room, 0).astype(np.int32)


def fused(a, b, c):
    """a * b + c, rounded once: the float64 sum is rounded to odd first."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    odd = total.view(np.int64) & 1
    other = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error == 0) | (odd == 1) | ~np.isfinite(total), total, other).astype(
        np.float32
    )


def minimum(a, b):
    """The one that is a number; -0 is below +0."""
    first = np.where(a == b, np.signbit(a), a < b)
    return _number(a, b, first)


def maximum(a, b):
    first = np.where(a == b, ~np.signbit(a), a > b)
    return _number(a, b, first)


def _number(a, b, first):
    bits = np.where((b != b) | ((a == a) & first), bits_of(a), bits_of(b))
    return np.where((a != a) & (b != b), QUIET_NAN, bits).view(np.float32)


def minimum_nan(a, b):
    return np.where((a != a) | (b != b), QUIET_NAN, bits_of(minimum(a, b))).view(np.float32)


def maximum_nan(a, b):
    return np.where((a != a) | (b != b), QUIET_NAN, bits_of(maximum(a, b))).view(np.float32)


def flush(value):
    """Subnormal numbers become zeros of their sign."""
    tiny = np.abs(value) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), value), value).astype(np.float32)


def ex2(a):
    return flush(np.exp2(flush(a).astype(np.float64)).astype(np.float32))


def rcp(a):
    return flush(np.float32(1) / flush(a))


def rsqrt(a):
    return flush((1 / np.sqrt(flush(a).astype(np.float64))).astype(np.float32))


def bf16(a):
    """Bits of the nearest bfloat16, ties to even."""
    bits = bits_of(a)
    return np.where(a != a, np.uint32(0x7FFF), bits + (bits >> 16 & 1) + 0x7FFF >> 16)


def e4m3(a):
    """Bits of the nearest e4m3, ties to even, saturating."""
    size = np.minimum(np.abs(a), np.float32(448)).astype(np.float64)
    exponent = np.where(size == 0, -6, np.maximum(np.frexp(size)[1] - 1, -6))
    units = np.rint(np.ldexp(size, 3 - exponent)).astype(np.uint32)  # 8..16 if normal
    code = units + (exponent + 6).astype(np.uint32) * 8
    code = np.where(a != a, np.uint32(127), code).astype(np.uint32)
    return code | np.where(np.signbit(a) & (a == a), np.uint32(128), np.uint32(0))
