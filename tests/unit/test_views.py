"""Host views of the workspace: cached, typed, at the table's offsets, and apart from each other."""

from __future__ import annotations

import pytest
import torch

from megamoe.config import MoEConfig, select
from megamoe.regions import layout_of
from workspace import Workspace
from workspace.layout import ALIGNMENT, BARRIER, LOCAL, SPACES, SPAN_ALIGNMENT, SYMMETRIC
from workspace.symmetric import allocate
from workspace.views import peer_table, view_of

CONFIGS = {
    "one rank": MoEConfig(4, 2, 128, 128, 5),
    "two ranks": MoEConfig(8, 3, 256, 128, 37, num_ranks=2),
    "eight ranks": MoEConfig(32, 4, 256, 256, 16, num_ranks=8),
    "scaled": MoEConfig(8, 3, 384, 256, 37, 2, "fp8_block"),
    "scaled rows": MoEConfig(8, 3, 256, 128, 37, 2, "fp8_channel"),
}


@pytest.fixture(params=CONFIGS)
def workspace(request):
    config = CONFIGS[request.param]
    return Workspace(layout_of(config, select(config, pool_blocks=4)))


def test_regions_are_the_same_objects_on_every_call(workspace):
    for rank in workspace.local_ranks:
        first = workspace.regions(rank)
        pointers = {name: view.data_ptr() for name, view in first.items()}
        again = workspace.regions(rank)
        assert again is first
        for name, view in again.items():
            assert view is first[name]
            assert view.data_ptr() == pointers[name]


def test_views_have_the_tables_type_place_and_alignment(workspace):
    for rank in workspace.local_ranks:
        views = workspace.regions(rank)
        assert list(views) == list(workspace.layout.regions)
        for name, region in workspace.layout.regions.items():
            view = views[name]
            assert tuple(view.shape) == region.shape
            assert view.dtype == getattr(torch, region.dtype)
            assert view.is_contiguous()
            assert view.nbytes == region.num_bytes
            base = workspace.allocation.base(rank, region.space)
            assert base % SPAN_ALIGNMENT == 0
            assert view.data_ptr() == base + region.offset
            assert view.data_ptr() % ALIGNMENT == 0


def test_ranks_and_spaces_share_no_memory(workspace):
    spans = []
    for rank in workspace.local_ranks:
        for space in SPACES:
            begin = workspace.allocation.base(rank, space)
            spans.append((begin, begin + workspace.layout.num_bytes(space)))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(("made", "viewed"), [(True, True), (True, False), (False, True)])
def test_memory_can_be_written_inside_and_outside_inference_mode(made, viewed):
    with torch.inference_mode(made):
        workspace = Workspace(layout_of(CONFIGS["scaled"]))
    with torch.inference_mode(viewed):
        views = [*workspace.regions(1).values(), workspace.reset_view(1)]
    for inside in (False, True, False):
        with torch.inference_mode(inside):
            for view in views:
                view.zero_()
                view[:1].zero_()
            workspace.recover()


def test_all_memory_is_zero_at_first(workspace):
    for rank in workspace.local_ranks:
        for span in workspace.allocation.spaces[rank].values():
            assert not span.any()


@pytest.mark.parametrize("name", list(layout_of(CONFIGS["two ranks"]).regions))
def test_writing_one_region_changes_no_other(name):
    workspace = Workspace(layout_of(CONFIGS["two ranks"]))
    views = workspace.regions(1)
    views[name].view(torch.uint8).fill_(0xFF)
    for other, view in views.items():
        filled = view.view(torch.uint8).bool()
        assert filled.all() if other == name else not filled.any(), other
    assert not any(span.any() for span in workspace.allocation.spaces[0].values())


def test_recover_zeroes_reset_span_and_header_and_no_data(workspace):
    for rank in workspace.local_ranks:
        for span in workspace.allocation.spaces[rank].values():
            span.fill_(0xFF)
    workspace.recover()
    for rank in workspace.local_ranks:
        assert not workspace.reset_view(rank).any()
        for name, view in workspace.regions(rank).items():
            region = workspace.layout[name]
            filled = view.view(torch.uint8).bool()
            assert not filled.any() if region.resets or region.kind == BARRIER else filled.all()


def test_reset_view_is_the_whole_span_and_nothing_more(workspace):
    view = workspace.reset_view(0)
    assert view.is_contiguous() and view.nbytes == workspace.reset_bytes
    assert view.data_ptr() == workspace.allocation.base(0, LOCAL) + workspace.layout.reset_span[0]


def test_sizes_and_description(workspace):
    assert workspace.reset_bytes == workspace.layout.reset_bytes
    assert workspace.total_bytes == workspace.layout.total_bytes
    held = sum(span.nbytes for span in workspace.allocation.spaces[0].values())
    assert held == workspace.total_bytes
    assert workspace.describe() == workspace.layout.describe()
    assert workspace.local_ranks == list(range(workspace.layout.config.num_ranks))


def test_peer_table_holds_the_symmetric_bases(workspace):
    world = workspace.layout.config.num_ranks
    bases = [workspace.allocation.base(rank, SYMMETRIC) for rank in range(world)]
    table = peer_table(workspace.allocation, torch.device("cpu"))
    assert table.dtype == torch.int64 and table.tolist() == bases
    assert workspace.peer_tables is workspace.peer_tables
    assert set(workspace.peer_tables) == set(range(world))
    for own in workspace.peer_tables.values():
        assert own.tolist() == bases


def test_unknown_rank():
    workspace = Workspace(layout_of(CONFIGS["two ranks"]))
    with pytest.raises(KeyError):
        workspace.regions(2)


def test_given_allocation_is_used():
    layout = layout_of(CONFIGS["two ranks"])
    allocation = allocate(layout, torch.device("cpu"))
    workspace = Workspace(layout, allocation=allocation)
    workspace.regions(1)["abort_flag"].fill_(7)
    assert workspace.allocation is allocation
    assert allocation.spaces[1][SYMMETRIC].any() and not allocation.spaces[0][SYMMETRIC].any()


def test_one_process_holds_all_ranks():
    layout = layout_of(CONFIGS["eight ranks"])
    allocation = allocate(layout, torch.device("cpu"))
    assert allocation.local_ranks == list(range(8)) and allocation.num_ranks == 8
    for rank in range(8):
        for space in SPACES:
            assert allocation.spaces[rank][space].nbytes == layout.num_bytes(space)


@pytest.mark.parametrize("name", list(layout_of(CONFIGS["one rank"]).regions))
def test_views_beyond_four_gib(name):
    """Views of a workspace of many gigabytes, without the memory: the offsets stay exact."""
    config = MoEConfig(64, 8, 8192, 4096, 65536)
    layout = layout_of(config, select(config, pool_blocks=8192))
    region = layout[name]
    span = torch.empty(layout.num_bytes(region.space), dtype=torch.uint8, device="meta")
    assert span.nbytes > 2**32
    view = view_of(span, region)
    assert view.storage_offset() * view.element_size() == region.offset
    assert tuple(view.shape) == region.shape and view.nbytes == region.num_bytes


@pytest.mark.gpu
def test_gpu_workspace(cuda):
    """The same table on a GPU: aligned, zeroed, cached, with a peer table on the device."""
    workspace = Workspace(layout_of(CONFIGS["eight ranks"]), cuda)
    for rank in workspace.local_ranks:
        views = workspace.regions(rank)
        assert workspace.regions(rank) is views
        for name, view in views.items():
            assert view.device == cuda and view.data_ptr() % ALIGNMENT == 0, name
            assert not view.view(torch.uint8).any()
        assert workspace.peer_tables[rank].device == cuda
    workspace.recover()
