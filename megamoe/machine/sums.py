"""How a tensor core adds: the sum of one instruction's products and the accumulator.

Tensor cores do not add in float32. The products of an instruction are aligned to the largest of
their exponents, bits below some place are cut off, and what is left is added exactly. A `Sums` says
where and how; `MODELS` holds the one in use for each operand type, `add` computes it. Nothing here
knows of instructions, shared memory or fragments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Explicit mantissa bits of an operand: where its lowest bit lies below its exponent.
MANTISSA_BITS = {"e4m3": 3, "bf16": 7}
#: Smallest exponent of a normal operand; subnormal ones have it too.
MIN_EXPONENT = {"e4m3": -6, "bf16": -126}
LOWEST = -10_000  # exponent of a zero: never the largest


@dataclass(frozen=True)
class Sums:
    """A way to add products.

    bits: places kept below the largest exponent of the terms; None: float32, one after the other.
    group: products that are added at a time; the groups follow each other.
    with_accumulator: it is one of the aligned terms, not added afterwards.
    normalised: the exponent of a product is that of its value, not the sum of its operands'.
    floor: bits are cut off in two's complement, not from the magnitude.
    nearest: a sum is rounded to the nearest float32, not towards zero.
    """

    bits: int | None = None
    group: int = 32
    with_accumulator: bool = True
    normalised: bool = False
    floor: bool = False
    nearest: bool = False


MODELS = {"e4m3": Sums(), "bf16": Sums()}


def exponents(values: np.ndarray, lowest: int = LOWEST) -> np.ndarray:
    """Floor of log2 |value|, at least `lowest`; LOWEST for zeros."""
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, lowest)
    return np.where(values == 0, LOWEST, exponent)


def to_float32(values: np.ndarray, nearest: bool) -> np.ndarray:
    """float64 as float32, to nearest even or towards zero."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
        if not nearest:
            away = np.abs(rounded.astype(np.float64)) > np.abs(values)
            rounded = np.where(away, np.nextafter(rounded, np.float32(0)), rounded)
    return rounded


def add(sums: Sums, kind: str, a: np.ndarray, b: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """accumulator [M, N] + a [M, K] @ b [N, K] in float32, for operands of one instruction (exact
    values, as float32).
    """
    if sums.bits is None:
        for left, right in zip(a.T, b.T, strict=True):
            accumulator = accumulator + left[:, None] * right
        return accumulator
    result = accumulator.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for first in range(0, a.shape[1], sums.group):
            columns = slice(first, first + sums.group)
            left, right = a[:, None, columns].astype(np.float64), b[None, :, columns]
            result = _add_group(sums, kind, left, right, result)
    return result.astype(np.float32)


def _add_group(sums: Sums, kind: str, left, right, accumulator: np.ndarray) -> np.ndarray:
    terms = left * right
    if sums.normalised:
        tops = exponents(terms)
    else:
        lowest = MIN_EXPONENT[kind]
        tops = exponents(left, lowest) + exponents(right, lowest)
    if sums.with_accumulator:
        terms = np.concatenate([terms, accumulator[..., None]], -1)
        tops = np.concatenate([tops, exponents(accumulator, -126)[..., None]], -1)
    plain = terms.sum(-1) + (0 if sums.with_accumulator else accumulator)
    top = np.maximum(tops.max(-1, keepdims=True), -600)
    quantum = np.exp2(top.astype(np.float64) - sums.bits)
    cut = (np.floor if sums.floor else np.trunc)(terms / quantum) * quantum
    total = cut.sum(-1)
    if not sums.with_accumulator:
        total = total + accumulator
    return np.where(np.isfinite(plain), to_float32(total, sums.nearest), plain).astype(np.float64)
