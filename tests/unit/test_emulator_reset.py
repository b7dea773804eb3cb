"""What has to be zero again between launches, and what need not: the reset policy, shown."""

from __future__ import annotations

import pytest
import torch

from megamoe.config import MoEConfig
from megamoe.faults import MegaMoEError
from megamoe.precision import PRECISIONS
from tests.emulated import Layer, WrongResult
from workspace import layout_of
from workspace.layout import BARRIER, DATA

TABLE = layout_of(MoEConfig(4, 2, 128, 128, 4, 2)).regions.values()
SCALED_TABLE = layout_of(MoEConfig(4, 2, 128, 128, 4, 2, "fp8_block")).regions.values()
RESETS = [region.name for region in TABLE if region.resets]
DATA_REGIONS = [region.name for region in TABLE if region.kind == DATA]
SCALED_DATA_REGIONS = [region.name for region in SCALED_TABLE if region.kind == DATA]
BARRIER_REGIONS = [region.name for region in TABLE if region.kind == BARRIER]

#: Three launches: enough that each counter and each padding row is met again.
LAUNCHES = (("uniform", 1), ("uniform", 2), ("masked", 3))


pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(**emulator) -> Layer:
    layer = Layer(2, 12, 2, experts=8, **emulator)
    layer.emulator.runtime.max_steps = 100_000
    return layer


def run(layer: Layer) -> list[torch.Tensor]:
    return [output for routing, seed in LAUNCHES for output in layer.check(routing, seed)]


def test_the_table_resets_enough():
    layer = make_layer(reset_regions=RESETS)
    run(layer)
    layer.emulator.assert_at_rest()


@pytest.mark.parametrize("region", RESETS)
def test_each_region_that_resets_must(region):
    layer = make_layer(reset_regions=set(RESETS) - {region})
    layer.check(*LAUNCHES[0])  # the first launch finds the zeros of the allocation
    with pytest.raises((MegaMoEError, WrongResult)):
        for routing, seed in LAUNCHES[1:]:
            layer.check(routing, seed)


@pytest.mark.parametrize(
    "precision,region",
    [("bf16", region) for region in DATA_REGIONS]
    + [("fp8_block", region) for region in SCALED_DATA_REGIONS],
)
def test_resetting_a_data_region_changes_nothing(precision, region):
    plain = run(make_layer(precision=precision))
    zeroed = run(make_layer(precision=precision, reset_regions={*RESETS, region}))
    assert all(torch.equal(a, b) for a, b in zip(plain, zeroed, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_data_regions_are_poisoned_and_never_seen(precision):
    """After a launch, poison is still there: nobody wrote it, and nobody read it."""
    layer = make_layer(precision=precision)
    layer.check("uniform", 0)
    for rank in range(2):
        views = layer.workspace.regions(rank)
        for region in DATA_REGIONS if precision == "bf16" else SCALED_DATA_REGIONS:
            view = views[region]
            bad = view.isnan() if view.dtype.is_floating_point else view == view.min()
            assert bad.any() or region in (
                "input_token_buffer",
                "input_sf_buffer",
                "expert_recv_count",
                "combine_output",
                "layer_output",
            )


@pytest.mark.parametrize("region", ["nvlink_barrier_signal", "nvlink_barrier_counter"])
def test_resetting_a_barrier_region_breaks_the_next_launch(region):
    layer = make_layer(reset_regions={*RESETS, region})
    with pytest.raises((MegaMoEError, WrongResult)):
        for seed in range(4):
            layer.check_many(["uniform"] * 3, seed)


def test_barrier_regions_are_known():
    assert BARRIER_REGIONS == ["nvlink_barrier_signal", "nvlink_barrier_counter", "abort_flag"]


@pytest.mark.parametrize("region", ["l1_topk_weights_buffer", "token_src_metadata"])
def test_padding_must_be_clean_within_a_launch_too(region):
    """A ring slot is used again by a smaller block: the FC2 cleaner has made its padding inert."""

    def rows(counts):
        """top-1 routing of one rank that gives expert j `counts[j]` rows."""
        ids = [expert for expert, count in enumerate(counts) for _ in range(count)]
        return torch.tensor(ids)[:, None]

    for resets, fails in ((RESETS, False), (set(RESETS) - {region}, True)):
        layer = Layer(1, 12, 1, experts=3, overrides={"pool_blocks": 1}, reset_regions=resets)
        idx = rows((8, 3, 1))
        x = torch.randn(12, 128, generator=layer.random).bfloat16()
        inputs = [x], [idx], [torch.ones(12, 1)]
        if fails:
            with pytest.raises(MegaMoEError, match=region):
                layer.emulator.launch(*inputs)
        else:
            layer.compare(layer.emulator.launch(*inputs), inputs)
