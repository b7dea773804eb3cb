"""What implementations are called in result rows: the layer, and whatever does part of its work."""

from __future__ import annotations

from typing import Any

from megamoe.config import COMBINE, DISPATCH, GEMMS

MEGAMOE = "megamoe"
#: What a forward does before its launch, alone.
STAGING = f"{MEGAMOE}_staging"
#: Routed and shared experts as layers of their own, side by side.
TWO_STREAMS = "two_streams"
#: Parts of a launch that a kernel can do alone (`KernelConfig.only`), in the order of tables.
PARTS = (GEMMS, DISPATCH, COMBINE)
#: Options of the kernels that an ablation launches: all, then each part.
ABLATION_KERNELS: tuple[dict[str, Any], ...] = ({}, *({"only": part} for part in PARTS))


def part_name(part: str) -> str:
    """The implementation that does this part of a launch alone."""
    return f"{MEGAMOE}-{part}"


#: Implementations that do a part of the layer's work.
PART_NAMES = (STAGING, *map(part_name, PARTS))
