"""What waits for `--nightly`."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from megamoe.precision import PRECISIONS


def at_night(*values: object):
    """Values of a parameter that are tried with --nightly only."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def built(recipes: Iterable[str] = PRECISIONS) -> list:
    """Recipes for tests that build kernels: one of 4-bit weights takes half a minute, and by day
    test_packed_weights and test_machine_launches run some.
    """
    return [at_night(name) if PRECISIONS[name].weights.packed else name for name in recipes]
