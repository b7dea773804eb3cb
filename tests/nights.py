"""What waits for `--nightly`."""

from __future__ import annotations

import pytest


def at_night(*values: object):
    """Values of a parameter that are tried with --nightly only."""
    return pytest.param(*values, marks=pytest.mark.nightly)
