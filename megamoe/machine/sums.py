"""How a Hopper tensor core adds: the products of one instruction and the accumulator.

It does not add in float32. The products (32 of e4m3, 16 of bfloat16) and the accumulator are
aligned to the largest of their exponents, that of a product being the sum of its operands'; what
lies more than `places` below is cut off each; the rest is added exactly, and of the sum `kept` bits
behind the leading one stay. Found by trying a family of models on 409,600 sums measured on an H100
and an H200 (2026-11-27, `tests/gpu/numerics.py`): both gave the same bits, whatever the width of
the instruction and wherever A lay, and this model gives them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LOWEST = -600  # exponent of a zero: never the largest
FLOAT_MIN_EXPONENT = -126


@dataclass(frozen=True)
class Sums:
    """`min_exponent`: of operands; subnormal ones have it too."""

    places: int
    kept: int
    min_exponent: int


MODELS = {"e4m3": Sums(13, 13, -6), "bf16": Sums(25, 23, -126)}
QUIET_NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def exponents(values: np.ndarray, lowest: int) -> np.ndarray:
    """Floor of log2 |value|, at least `lowest`; LOWEST for zeros."""
    with np.errstate(invalid="ignore"):
        exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, lowest)
    return np.where(values == 0, LOWEST, exponent)


def cut(values: np.ndarray, exponent: np.ndarray, places: int) -> np.ndarray:
    """Values without what lies more than `places` below an exponent; towards zero."""
    quantum = np.exp2((exponent - places).astype(np.float64))
    return np.trunc(values / quantum) * quantum


def add(kind: str, a: np.ndarray, b: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """accumulator [M, N] + a [M, K] @ b [N, K], float32: operands of one instruction, exactly."""
    sums, c = MODELS[kind], accumulator.astype(np.float64)
    left, right = a[:, None].astype(np.float64), b[None].astype(np.float64)
    tops = exponents(left, sums.min_exponent) + exponents(right, sums.min_exponent)
    with np.errstate(invalid="ignore"):
        terms = np.concatenate([left * right, c[..., None]], -1)
        tops = np.concatenate([tops, exponents(c, FLOAT_MIN_EXPONENT)[..., None]], -1)
        top = np.maximum(tops.max(-1, keepdims=True), LOWEST)
        total = cut(terms, top, sums.places).sum(-1)
        total = cut(total, exponents(total, FLOAT_MIN_EXPONENT), sums.kept)
        plain = terms.sum(-1)
    with np.errstate(over="ignore"):
        result = np.where(np.isfinite(plain), total, plain).astype(np.float32)
    return np.where(np.isnan(result), QUIET_NAN, result)
