"""The region table of a layer: where every buffer lies, and that what resets is one small span."""

from __future__ import annotations

import random

import pytest

from megamoe.config import KernelConfig, MoEConfig, max_pool_blocks, pool_blocks, select, supports
from megamoe.precision import ITEM_BYTES
from megamoe.regions import SIGNAL_STRIDE, LayerLayout, layout_of
from workspace.layout import (
    ALIGNMENT,
    BARRIER,
    COUNTER,
    DATA,
    KINDS,
    LOCAL,
    PADDING,
    SPACES,
    SPAN_ALIGNMENT,
    SYMMETRIC,
    align_up,
)

PRO = MoEConfig(384, 6, 7168, 3072, 32768, num_ranks=8)

CONFIGS = {
    "tiny": MoEConfig(4, 2, 128, 128, 1),
    "odd tokens": MoEConfig(8, 3, 256, 128, 37, num_ranks=2),
    "one expert": MoEConfig(1, 1, 128, 128, 5),
    "v3 decode": MoEConfig(256, 8, 7168, 2048, 128, num_ranks=8),
    "v3 prefill": MoEConfig(256, 8, 7168, 2048, 8192, num_ranks=8),
    "flash": MoEConfig(256, 6, 4096, 2048, 4096, num_ranks=4),
    "pro": PRO,
    "72 ranks": MoEConfig(288, 6, 7168, 3072, 512, num_ranks=72),
    "one rank, large": MoEConfig(64, 8, 4096, 2048, 65536),
    "scaled, odd": MoEConfig(8, 3, 384, 128, 37, 2, "fp8_block"),
    "scaled v3": MoEConfig(256, 8, 7168, 2048, 4096, 8, "fp8_block"),
    "scaled flash": MoEConfig(256, 6, 4096, 2048, 4096, 4, "fp8_channel"),
}
LAYOUTS = [pytest.param(layout_of(config), id=name) for name, config in CONFIGS.items()]


def random_layout(seed: int) -> LayerLayout:
    rng = random.Random(seed)
    world = rng.choice([1, 2, 3, 4, 8, 16, 36, 72])
    config = MoEConfig(
        num_experts=world * rng.randint(1, 9),
        top_k=rng.randint(1, 16),
        hidden_size=128 * rng.randint(1, 60),
        intermediate_size=128 * rng.randint(1, 30),
        max_tokens_per_rank=rng.randint(1, 9000),
        num_ranks=world,
    )
    kernel = select(config, pool_blocks=rng.choice([None, 1, 5, 400]))
    supports(config, kernel)
    return layout_of(config, kernel)


LAYOUTS += [pytest.param(random_layout(seed), id=f"seed {seed}") for seed in range(30)]

COUNTERS = {
    "grid_sync_counter",
    "load_balance_counter",
    "expert_send_count",
    "l1_arrival_count",
    "fc1_done_counter",
    "fc2_done_counter",
}
PADDINGS = {"l1_topk_weights_buffer", "token_src_metadata"}
BARRIERS = {"nvlink_barrier_signal", "nvlink_barrier_counter", "abort_flag"}
PEER_WRITTEN = {"nvlink_barrier_signal", "expert_recv_count", "routed_record", "combine_output"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_regions_of_a_space_are_aligned_and_do_not_overlap(layout):
    for space in SPACES:
        regions = sorted(layout.of_space(space), key=lambda region: region.offset)
        assert regions[0].offset == 0 and not any(region.offset % ALIGNMENT for region in regions)
        for before, after in zip(regions, regions[1:], strict=False):
            assert before.end <= after.offset < before.end + ALIGNMENT
        assert regions[-1].end <= layout.num_bytes(space) < regions[-1].end + SPAN_ALIGNMENT
        assert layout.num_bytes(space) % SPAN_ALIGNMENT == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_follow_from_shape_and_dtype(layout):
    for region in layout.regions.values():
        items = 1
        for extent in region.shape:
            assert isinstance(extent, int) and extent > 0, region.name
            items *= extent
        assert region.num_bytes == items * ITEM_BYTES[region.dtype] == region.end - region.offset


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kinds_are_those_of_the_protocol(layout):
    kinds = {kind: {r.name for r in layout.regions.values() if r.kind == kind} for kind in KINDS}
    assert kinds[COUNTER] == COUNTERS
    assert kinds[PADDING] == PADDINGS
    assert kinds[BARRIER] == BARRIERS
    assert kinds[DATA] == set(layout.regions) - COUNTERS - PADDINGS - BARRIERS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reset_span_holds_the_regions_that_reset_and_nothing_else(layout):
    begin, end = layout.reset_span
    assert begin == 0 and layout.reset_bytes == end - begin
    resets = COUNTERS | PADDINGS
    for name, region in layout.regions.items():
        inside = region.space == LOCAL and begin <= region.offset and region.end <= end
        assert inside == (name in resets) == region.resets, name
        if region.space == LOCAL and not inside:
            assert region.offset >= end, name
    # contiguous: between the regions lies alignment and no more
    used = sum(layout[name].num_bytes for name in resets)
    assert used <= layout.reset_bytes < used + ALIGNMENT * len(resets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_peers_write_never_resets(layout):
    """A host reset of a word that a peer writes would race with a fast peer of the next launch."""
    for region in layout.of_space(SYMMETRIC):
        assert not region.resets, region.name
    for name in PEER_WRITTEN:
        assert layout[name].space == SYMMETRIC


@pytest.mark.parametrize("layout", LAYOUTS)
def test_header_comes_first(layout):
    begin, end = layout.header_span
    assert begin == 0
    for name, region in layout.regions.items():
        if name in BARRIERS:
            assert region.space == SYMMETRIC and region.end <= end
        elif region.space == SYMMETRIC:
            assert region.offset >= end


@pytest.mark.parametrize("layout", LAYOUTS)
def test_barrier_words_have_a_cache_line_each(layout):
    signal = layout["nvlink_barrier_signal"]
    assert signal.shape == (layout.config.num_ranks, SIGNAL_STRIDE)
    assert SIGNAL_STRIDE * signal.item_bytes >= 128


def test_reset_is_small_where_the_workspace_is_large():
    layout = layout_of(PRO)
    assert layout.reset_bytes <= 600_000
    assert layout.total_bytes > 4_000_000_000


def test_offsets_pass_two_and_four_gib():
    """64-bit offsets, to the byte, in both spaces."""
    config = MoEConfig(64, 8, 8192, 4096, 65536, num_ranks=1)
    layout = layout_of(config, select(config, pool_blocks=8192))
    combine = layout["combine_output"]
    assert combine.num_bytes == 65536 * 8 * 8192 * 2 == 8 * 2**30
    assert combine.end > 2**33 > 2**31
    assert layout["input_token_buffer"].end == combine.offset
    fc1_output = layout["fc1_output"]
    rows = pool_blocks(config, layout.kernel) * 128
    assert fc1_output.offset > 2**32
    assert fc1_output.offset == layout["l1_token_buffer"].offset + rows * 8192 * 2
    assert layout.num_bytes(LOCAL) == align_up(fc1_output.offset + rows * 4096 * 2, SPAN_ALIGNMENT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_of_the_regions(layout):
    config = layout.config
    world, slots = config.num_ranks, config.max_slots_per_rank
    blocks = max_pool_blocks(config, layout.kernel)
    rows = pool_blocks(config, layout.kernel) * layout.kernel.block_m
    expected = {
        "expert_recv_count": (world, config.local_experts, 2),
        "routed_record": (world, slots, 2),
        "input_token_buffer": (config.max_tokens_per_rank, config.hidden_size),
        "combine_output": (config.max_tokens_per_rank, config.slots_per_token, config.hidden_size),
        "expert_send_count": (config.num_experts,),
        "l1_arrival_count": (blocks,),
        "fc1_done_counter": (blocks,),
        "fc2_done_counter": (blocks,),
        "l1_topk_weights_buffer": (rows,),
        "token_src_metadata": (rows,),
        "l1_token_buffer": (rows, config.hidden_size),
        "fc1_output": (rows, config.intermediate_size),
    }
    assert {key: layout[key].shape for key in expected} == expected


def test_layout_is_a_function_of_the_configuration_alone():
    """Every rank computes the same symmetric offsets: equal configurations, one object."""
    again = MoEConfig(384, 6, 7168, 3072, 32768, num_ranks=8)
    assert layout_of(PRO) is layout_of(again)
    fresh = layout_of.__wrapped__(again)
    assert fresh.regions == layout_of(PRO).regions
    # The ring only changes local space; peers with another ring would still address each other.
    small = layout_of(again, select(again, pool_blocks=64))
    for region in small.of_space(SYMMETRIC):
        assert region == layout_of(PRO)[region.name]


def test_layout_of_takes_the_selected_kernel_by_default():
    assert layout_of(PRO).kernel == select(PRO)
    assert layout_of(PRO, KernelConfig(pool_blocks=32)).kernel.pool_blocks == 32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_describe_lists_every_region(layout):
    head, rule, *rows, summary = layout.describe().splitlines()
    assert head.split() == ["region", "kind", "space", "dtype", "shape", "bytes"]
    assert set(rule) == {"-", " "}
    assert len(rows) == len(layout.regions)
    for row, region in zip(rows, layout.regions.values(), strict=True):
        shape = "x".join(str(extent) for extent in region.shape)
        assert row.split() == [
            region.name,
            region.kind,
            region.space,
            region.dtype,
            shape,
            f"{region.num_bytes:,}",
        ]
    assert f"reset between launches {layout.reset_bytes:,} of {layout.total_bytes:,}" in summary
    for kind, size in layout.bytes_by_kind().items():
        assert f"{kind} {size:,}" in summary


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_by_kind_add_up(layout):
    by_kind = layout.bytes_by_kind()
    assert tuple(by_kind) == KINDS
    total = sum(region.num_bytes for region in layout.regions.values())
    assert sum(by_kind.values()) == total <= layout.total_bytes
    slack = ALIGNMENT * len(layout.regions) + 2 * SPAN_ALIGNMENT
    assert layout.total_bytes < total + slack
    assert layout.total_bytes == sum(layout.num_bytes(space) for space in SPACES)
