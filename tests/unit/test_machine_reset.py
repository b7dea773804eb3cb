"""What has to be zero again between launches, and what need not: the reset policy, shown."""

from __future__ import annotations

import re

import pytest
import torch

from megamoe.config import MoEConfig
from megamoe.faults import MegaMoEError
from megamoe.regions import layout_of
from tests.machine import Layer
from tests.mutants import Mutator, install, watch
from tests.nights import at_night
from workspace.layout import BARRIER, DATA

TABLES = {
    precision: layout_of(MoEConfig(4, 2, 128, 128, 4, 2, precision)).regions.values()
    for precision in ("bf16", "fp8_block")
}
RESETS = [region.name for region in TABLES["bf16"] if region.resets]
BARRIERS = [region.name for region in TABLES["bf16"] if region.kind == BARRIER]
#: Weights of rows that pad a block: the combine drops these rows whatever they hold. With zeros
#: FC1's output of them is zero, which costs less power.
SPARES_POWER = "l1_topk_weights_buffer"
#: Enough that each counter and each padding row is met again.
LAUNCHES = (("uniform", 1), ("uniform", 2), ("masked", 3))

pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(precision: str = "bf16") -> Layer:
    # The sizes of `tests.unit.layers`, whose kernel is there already.
    return Layer(2, 12, 2, experts=8, hidden=256, precision=precision, patient=False)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return make_layer()


@pytest.fixture(scope="module")
def mutants(layer) -> list:
    code = watch(layer)
    for routing, seed in LAUNCHES:
        layer.check(routing, seed)
    return Mutator(layer, code).mutants()


@pytest.mark.parametrize("region", RESETS)
def test_each_region_that_resets_must(layer, mutants, region):
    """The kernel as it is, but without its last stores of zero to the region: the first launch
    finds the zeros of the allocation, and a later one does not come to the right end.
    """
    (mutant,) = [m for m in mutants if re.match(f"no store {region} by (math|report) ", m.name)]
    (code,) = layer.backend.kernel.launches.codes().values()
    layer.backend.recover()
    install(layer, mutant.of(code))
    try:
        layer.check(*LAUNCHES[0])
        if region == SPARES_POWER:
            layer.check(*LAUNCHES[1])
            with pytest.raises(AssertionError, match=region):
                layer.assert_at_rest()
            return
        with pytest.raises((MegaMoEError, AssertionError)):
            for routing, seed in LAUNCHES[1:]:
                layer.check(routing, seed)
    finally:
        install(layer, code)
        layer.backend.recover()


@pytest.mark.parametrize("precision", ["bf16", at_night("fp8_block")])
def test_resetting_data_regions_changes_nothing(precision):
    layer = make_layer(precision)
    state = layer.random.get_state()

    def outputs(zeroed: str | None = None) -> list[torch.Tensor]:
        layer.random.set_state(state)
        found = []
        for launch in LAUNCHES:
            for rank in range(2 if zeroed else 0):
                layer.workspace.regions(rank)[zeroed].view(torch.uint8).zero_()
            found += [output.clone() for output in layer.check(*launch)]
        return found

    plain = outputs()
    for region in TABLES[precision]:
        if region.kind == DATA:
            again = outputs(region.name)
            assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), region.name


@pytest.mark.parametrize("region", ["nvlink_barrier_signal", "nvlink_barrier_counter"])
def test_resetting_a_barrier_region_breaks_the_next_launch(layer, region):
    """A rank that comes first would take the last launch's signals for this one's, or miss them."""
    layer.check(*LAUNCHES[0])
    layer.workspace.regions(0)[region].zero_()
    with pytest.raises((MegaMoEError, AssertionError)):
        layer.check(*LAUNCHES[1])
    layer.backend.recover()


def test_barrier_regions_are_known():
    assert BARRIERS == ["nvlink_barrier_signal", "nvlink_barrier_counter", "abort_flag"]
