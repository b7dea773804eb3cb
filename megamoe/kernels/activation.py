"""Activations on the device, under the names of their rows: what an epilogue does with float32
sums of FC1, two neighbouring outputs of a row at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass.cute as cute

from megamoe.kernels.ptx import max_or_nan, min_or_nan, silu_pair

arch = cute.arch

NO_LIMIT = 3e38  # a limit above this is none


class DeviceActivation(NamedTuple):
    """bound: of one sum, before the rest: (value, is it an up value, limit); None where nothing is
    bounded. It may be left out where the limit is none.
    outputs: of two neighbouring columns: (gates, ups, parameters after the limit); without a gate
    `gates` are the sums and `ups` is None.
    """

    bound: Callable | None
    outputs: Callable


def clamp_value(value, is_up: bool, limit):
    """Gates at most `limit`, ups within +-`limit`; NaN stays."""
    value = min_or_nan(value, limit)
    return max_or_nan(value, -limit) if is_up else value


def swiglu(gates, ups, parameters):
    activated = silu_pair(*gates)
    return [activated[q] * ups[q] for q in range(2)]


def gpt_oss(gates, ups, parameters):
    """gate * sigmoid(alpha * gate) * (up + 1)."""
    (alpha,) = parameters
    activated = silu_pair(gates[0], gates[1], alpha)
    return [activated[q] * (ups[q] + 1.0) for q in range(2)]


def relu2(values, ups, parameters):
    """The square of what is above 0; NaN stays."""
    positive = [max_or_nan(value, 0.0) for value in values]
    return [value * value for value in positive]


ACTIVATIONS = {
    "swiglu": DeviceActivation(clamp_value, swiglu),
    "gpt_oss": DeviceActivation(clamp_value, gpt_oss),
    "relu2": DeviceActivation(None, relu2),
}
