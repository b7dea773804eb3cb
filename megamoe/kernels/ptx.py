"""Thin names for single instructions, and typed pointers from 64-bit addresses.

Nothing here knows the layer. Addresses are Int64 bytes; multiply in Int64 before adding (pools pass
2 GiB).
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8
from cutlass.experimental import primitives as prims

arch = cute.arch

LOG2_E = 1.4426950408889634


def global_ptr(address, dtype=Int32, align=4):
    """Typed global pointer to a byte address (own or peer memory)."""
    return cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)


def load_acquire(pointer, scope):
    """Acquire load whose value nobody needs. Inline, because the compiler was seen to drop
    `arch.load(sem="acquire")` with an unused result (4.8.1), and with it the ordering.
    """
    return arch.inline_ptx(
        f"ld.acquire.{scope}.global.b32 {{$w0}}, [{{$r0}}];",
        write_only_types=[Int32],
        read_only_args=[pointer],
    )


def store_global(address, word):
    """One Int32. A call, because the DSL takes every name inside a subscript target for an assigned
    variable.
    """
    global_ptr(address)[0] = word


def load_global_v4_if(address, condition):
    """16 bytes as four Int32, or zeros without touching memory where `condition` (Int32) is 0.

    A predicated load and not a branch, so that several of them are in flight together.
    """
    return arch.inline_ptx(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; "
        "mov.b32 {$w2}, 0; mov.b32 {$w3}, 0; "
        "@p ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }",
        write_only_types=[Int32] * 4,
        read_only_args=[global_ptr(address, Int32, 16), condition],
    )


def load_global_if(address, condition, num_bytes: int):
    """The same of 2, 4, 8 or 16 bytes, as a list of Int32; 2 are the lower half of one."""
    words = max(1, num_bytes // 4)
    if words == 4:
        return list(load_global_v4_if(address, condition))
    zeros = "".join(f"mov.b32 {{$w{n}}}, 0; " for n in range(words))
    kind, into = {2: ("u16", "{$w0}"), 4: ("b32", "{$w0}"), 8: ("v2.b32", "{{$w0}, {$w1}}")}[
        num_bytes
    ]
    loaded = arch.inline_ptx(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; "
        + zeros
        + f"@p ld.global.{kind} {into}, [{{$r0}}]; }}",
        write_only_types=[Int32] * words,
        read_only_args=[global_ptr(address, Int32, num_bytes), condition],
    )
    return [loaded] if words == 1 else list(loaded)


def store_global_v4(address, words):
    arch.inline_ptx(
        "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[global_ptr(address, Int32, 16), *words],
    )


def store_global_v2(address, first, second):
    """8 bytes in one store, so that a record is never seen half written."""
    arch.inline_ptx(
        "st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};",
        read_only_args=[global_ptr(address, Int32, 8), first, second],
    )


def load_global_v2(address):
    return arch.inline_ptx(
        "ld.global.v2.b32 {{$w0}, {$w1}}, [{$r0}];",
        write_only_types=[Int32] * 2,
        read_only_args=[global_ptr(address, Int32, 8)],
    )


def load_shared(pointer):
    return arch.inline_ptx(
        "ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[pointer]
    )


def load_shared_u16(pointer):
    """16 bits as the lower half of an Int32."""
    return arch.inline_ptx(
        "ld.shared.u16 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[pointer]
    )


def load_shared_v2(pointer):
    return arch.inline_ptx(
        "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];",
        write_only_types=[Int32] * 2,
        read_only_args=[pointer],
    )


def load_shared_v4(pointer):
    return arch.inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[pointer],
    )


def load_shared_volatile(pointer):
    """One Int32 that another warp may change at any time."""
    return arch.inline_ptx(
        "ld.volatile.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[pointer]
    )


def store_shared_volatile(pointer, word):
    """One Int32 that another warp looks at while it is stored."""
    arch.inline_ptx("st.volatile.shared.b32 [{$r0}], {$r1};", read_only_args=[pointer, word])


def store_shared(pointer, word):
    arch.inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[pointer, word])


def store_shared_v2(pointer, first, second):
    arch.inline_ptx(
        "st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[pointer, first, second]
    )


def store_matrices_transposed(pointer, matrices):
    """Columns of 8 x 8 matrices of 16 bits, 1, 2 or 4 of them, as rows of 16 bytes: lane 8 m + i
    has the address of column i of matrix m, and of every matrix row lane / 4, columns
    2 (lane % 4) and the next, in a word.
    """
    count = len(matrices)
    words = ", ".join(f"{{$r{number + 1}}}" for number in range(count))
    arch.inline_ptx(
        f"stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [{{$r0}}], {{{words}}};",
        read_only_args=[pointer, *matrices],
    )


def pack_bf16x2(low, high):
    """Two float32 rounded to nearest even, `low` in the lower half."""
    return arch.inline_ptx(
        "cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Int32],
        read_only_args=[high, low],
    )


def pack_e4m3x4(values):
    """Four float32 rounded to nearest even e4m3, saturating; the first in the lowest byte."""
    return arch.inline_ptx(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2}; mov.b32 {$w0}, {low, high}; }",
        write_only_types=[Int32],
        read_only_args=list(values),
    )


def store_shared_e4m3x2(pointer, low, high):
    """Two bytes: two float32 rounded to nearest even e4m3, saturating."""
    arch.inline_ptx(
        "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, {$r2}, {$r1}; "
        "st.shared.b16 [{$r0}], pair; }",
        read_only_args=[pointer, low, high],
    )


def unpack_bf16x2(word):
    """(low, high) of two bf16 as float32."""
    return (
        prims.mov_b32(word << 16, target_type=Float32),
        prims.mov_b32(word & Int32(-65536), target_type=Float32),
    )


def opaque(word):
    """The same Int32, computed anew as far as the compiler knows: what follows from it is not
    hoisted out of a loop, where it would hold registers.
    """
    return arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[word])


def select(condition, yes, no):
    """`yes` where `condition` (Int32) is not 0, else `no`: Float32, without a branch."""
    return arch.inline_ptx(
        "{ .reg .pred p; setp.ne.b32 p, {$r0}, 0; selp.b32 {$w0}, {$r1}, {$r2}, p; }",
        write_only_types=[Float32],
        read_only_args=[condition, yes, no],
    )


def min_or_nan(x, y):
    """The smaller Float32, or NaN if one of them is: min.f32 would return the other."""
    return arch.inline_ptx(
        "min.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y]
    )


def max_or_nan(x, y):
    return arch.inline_ptx(
        "max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y]
    )


def fma(a, b, c):
    """a * b + c, rounded once."""
    return arch.inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


def rsqrt_approx(value):
    """1 / sqrt(value) to two units in the last place; of a subnormal number infinite."""
    return arch.inline_ptx(
        "rsqrt.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value]
    )


def as_float(word):
    return prims.mov_b32(word, target_type=Float32)


def as_word(value):
    return prims.mov_b32(value, target_type=Int32)


def silu_pair(x, y, alpha=1.0):
    """v * sigmoid(alpha * v) of two values with one reciprocal between them: the special function
    unit is what an epilogue waits for. Below -41 / alpha the factor stays 2^-60, so that the
    product cannot overflow.
    """
    slope = -LOG2_E * alpha
    exp2 = cute.math.exp2  # type: ignore[attr-defined]
    a, b = (1.0 + exp2(arch.fmin(slope * v, 60.0), fastmath=True) for v in (x, y))
    inverse = arch.rcp_approx(a * b)
    return x * (inverse * b), y * (inverse * a)


def bulk_load(shared, address, barrier, num_bytes):
    """Asynchronous copy of `num_bytes` (multiple of 16) from global or peer memory; completes on
    `barrier`.
    """
    source = global_ptr(address, Uint8, 16)
    prims.cp_async_bulk_shared_cluster_global(
        shared.to_llvm_ptr(), source.to_llvm_ptr(), barrier.to_llvm_ptr(), num_bytes
    )


def bulk_store(address, shared, num_bytes):
    """Asynchronous copy to global memory as a bulk group of its own; the issuing thread must wait
    for it.
    """
    target = global_ptr(address, Uint8, 16)
    prims.cp_async_bulk_global_shared_cta(target.to_llvm_ptr(), shared.to_llvm_ptr(), num_bytes)
    arch.cp_async_bulk_commit_group()


def global_timer():
    """Nanoseconds; the same clock on every CTA of a GPU."""
    return Int64(arch.globaltimer())


def nanosleep(nanoseconds):
    prims.nanosleep(nanoseconds)
