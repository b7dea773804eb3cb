"""What waits for `--nightly`."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from megamoe.precision import PRECISIONS


def at_night(*values: object):
    """Values of a parameter that are tried with --nightly only."""
    return pytest.param(*values, marks=pytest.mark.nightly)


#: The recipe of 4-bit weights that stands for the others by day.
BY_DAY = "fp8_mxfp4"


def one_packed(recipes: Iterable[str] = PRECISIONS) -> list:
    """Recipes for tests that build kernels, of 4-bit weights one by day."""
    return [
        at_night(name) if PRECISIONS[name].weights.packed and name != BY_DAY else name
        for name in recipes
    ]


def built(recipes: Iterable[str] = PRECISIONS) -> list:
    """Recipes for tests that build kernels: one of 4-bit weights takes half a minute, and by day
    test_packed_weights and test_machine_launches run some.
    """
    return [at_night(name) if PRECISIONS[name].weights.packed else name for name in recipes]
