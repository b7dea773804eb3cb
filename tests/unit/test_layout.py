"""Layout and workspace of any table of regions: nothing here knows of the layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workspace import Layout, Region, Workspace
from workspace.layout import (
    ALIGNMENT,
    BARRIER,
    COUNTER,
    DATA,
    LOCAL,
    PADDING,
    SPACES,
    SPAN_ALIGNMENT,
    SYMMETRIC,
    align_up,
)


def region(name, space, kind, shape=(3,), dtype="int32", **access) -> Region:
    return Region(name, dtype, shape, space, kind, "writer", "reader", "reason", **access)


#: In an order in which it cannot lie in memory.
TABLE = (
    region("rows", LOCAL, DATA, (5, 7), "bfloat16", bulk=True),
    region("inbox", SYMMETRIC, DATA, (9,), "float8_e4m3fn", host_writes=True),
    region("weights", LOCAL, PADDING, (2, 40), "float32"),
    region("signal", SYMMETRIC, BARRIER, (33,), atomic=True),
    region("tickets", LOCAL, COUNTER, (1,), "int64", atomic=True),
    region("epoch", SYMMETRIC, BARRIER, (1,)),
)
LAYOUT = Layout(2, TABLE)


def test_every_space_begins_with_its_header_or_with_what_resets():
    order = sorted(LAYOUT.of_space(SYMMETRIC), key=lambda r: r.offset)
    assert [r.name for r in order] == ["signal", "epoch", "inbox"]
    order = sorted(LAYOUT.of_space(LOCAL), key=lambda r: r.offset)
    assert [r.name for r in order] == ["tickets", "weights", "rows"]
    assert list(LAYOUT.regions) == [r.name for r in TABLE]  # numbers are those of the table
    assert [LAYOUT.index(r.name) for r in TABLE] == list(range(len(TABLE)))
    with pytest.raises(KeyError):
        LAYOUT["no_such_region"]


def test_offsets_by_hand():
    offsets = {name: placed.offset for name, placed in LAYOUT.regions.items()}
    assert offsets == {
        "signal": 0, "epoch": 256, "inbox": 384, "tickets": 0, "weights": 128, "rows": 512,
    }  # fmt: skip
    assert LAYOUT.header_span == (0, 260) and LAYOUT.reset_span == (0, 448)
    assert [LAYOUT.num_bytes(space) for space in SPACES] == [1024, 1024]
    assert LAYOUT["rows"].row_bytes == 14


@pytest.mark.parametrize("table", [(), TABLE[:1], TABLE[1:2]])
def test_tables_without_counters_or_without_a_space(table):
    layout = Layout(1, table)
    assert layout.reset_bytes == 0 and layout.header_span == (0, 0)
    workspace = Workspace(layout)
    workspace.recover()
    assert list(workspace.regions()) == [r.name for r in table]
    assert workspace.total_bytes == SPAN_ALIGNMENT * len(table)


def test_a_workspace_of_any_table():
    workspace = Workspace(LAYOUT)
    assert workspace.local_ranks == [0, 1]
    for span in workspace.allocation.spaces[1].values():
        span.fill_(1)
    workspace.recover()
    left = {name for name, view in workspace.regions(1).items() if view.view(torch.uint8).any()}
    assert left == {"rows", "inbox"}
    assert "tickets" in workspace.describe()


@pytest.mark.parametrize(
    ("space", "kind"),
    [(SYMMETRIC, COUNTER), (SYMMETRIC, PADDING), (LOCAL, BARRIER), ("shared", DATA), (LOCAL, "x")],
)
def test_regions_that_cannot_be(space, kind):
    """What resets is local: a reset would wipe a word of a fast peer. Peers meet in symmetric
    memory.
    """
    with pytest.raises(AssertionError):
        region("name", space, kind)


def test_two_regions_of_one_name():
    with pytest.raises(AssertionError, match="one name"):
        _ = Layout(1, (TABLE[0], replace(TABLE[1], name="rows"))).regions


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int16", "int32", "int64", "float8_e4m3fn", "bfloat16", "float32", "float64"],
)
def test_item_bytes_are_those_of_torch(dtype):
    one = region("name", LOCAL, DATA, (3, 5), dtype)
    assert one.item_bytes == getattr(torch, dtype).itemsize
    assert one.num_bytes == 15 * one.item_bytes == 3 * one.row_bytes


@pytest.mark.parametrize(
    "value,alignment,expected", [(0, 128, 0), (1, 128, 128), (128, 128, 128), (129, 128, 256)]
)
def test_align_up(value, alignment, expected):
    assert align_up(value, alignment) == expected


def test_alignment():
    assert all(placed.offset % ALIGNMENT == 0 for placed in LAYOUT.regions.values())
