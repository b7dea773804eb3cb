"""What waits for `--nightly`."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from megamoe.precision import PRECISIONS


def at_night(*values: object):
    """Values of a parameter that are tried with --nightly only."""
    return pytest.param(*values, marks=pytest.mark.nightly)


#: Recipes that are tried everywhere by day.
WIDE = ("bf16", "fp8_block")
#: The recipe of 4-bit weights that stands for the others by day.
BY_DAY = "fp8_mxfp4"


def one_packed(recipes: Iterable[str] = PRECISIONS) -> list:
    """Recipes for tests that build kernels, of 4-bit weights one by day."""
    return [
        at_night(name) if PRECISIONS[name].weights.packed and name != BY_DAY else name
        for name in recipes
    ]


def built(recipes: Iterable[str] = PRECISIONS) -> list:
    """Recipes for tests that build kernels, which takes ten seconds to half a minute each: by day
    those of WIDE, while test_machine_launches and test_packed_weights run some of the others.
    """
    return [name if name in WIDE else at_night(name) for name in recipes]
