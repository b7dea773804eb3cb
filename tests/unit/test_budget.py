"""The map of a CTA's shared memory: arrivals at its barriers, counted from the tables that open the
SM90 kernel, and its bytes, from what the host asks for at a launch.
"""

from __future__ import annotations

import pytest

from megamoe import compile
from megamoe.budget import NUM_PULL_BUFFERS, QUEUE_SLOTS, Budget, budget_of
from megamoe.config import MoEConfig, select
from megamoe.dsl import HAVE_DSL
from megamoe.precision import PRECISIONS
from tests.nights import at_night, one_packed
from tests.unit import layers

#: Warps of a CTA by role; of math, in each of its warpgroups.
WARPS = {"dispatch": 1, "report": 1, "load_weights": 1, "load_tokens": 1, "math": 4}
#: Roles whose warps each arrive once.
ARRIVE = {
    "full": ["load_tokens", "load_weights"],
    "empty": ["math"],
    "queue_full": ["load_weights"],
    "queue_empty": ["load_tokens", "report", "math"],
    "stored": ["math"],
    "pulled": ["dispatch"],
}

every_recipe = pytest.mark.parametrize("precision", PRECISIONS)
every_width = pytest.mark.parametrize("warpgroups", [1, 2])


def budget(precision: str, warpgroups: int, **overrides) -> Budget:
    config = MoEConfig(8, 2, 256, 256, 16, 2, precision)
    return budget_of(config, select(config, block_m=64 * warpgroups, **overrides))


@every_recipe
@every_width
@pytest.mark.parametrize("pipeline", ARRIVE)
def test_arrivals(precision, warpgroups, pipeline):
    arrivals = 0
    for role in ARRIVE[pipeline]:
        arrivals += WARPS[role] * (warpgroups if role == "math" else 1)
    assert budget(precision, warpgroups).parts[pipeline].arrivals == arrivals


@every_recipe
@every_width
def test_arrivals_of_lanes_and_of_a_warpgroup(precision, warpgroups):
    parts = budget(precision, warpgroups).parts
    assert parts["metadata_full"].arrivals == 32 * WARPS["load_tokens"]
    assert parts["multiplied"].arrivals == WARPS["math"]


@every_recipe
@every_width
@pytest.mark.parametrize("stages", [2, 4])
def test_barriers(precision, warpgroups, stages):
    barriers = {
        "stage": {"full": stages, "empty": stages},
        "tile": dict.fromkeys(
            ["queue_full", "queue_empty", "metadata_full", "stored"], QUEUE_SLOTS
        ),
        "warpgroup": {"multiplied": warpgroups},
        "piece": {"pulled": NUM_PULL_BUFFERS},
    }
    rings = budget(precision, warpgroups, num_stages=stages).rings
    found = {ring: {part.name: part.num_items for part in parts} for ring, parts in rings.items()}
    assert found == barriers
    assert all(part.num_bytes == 8 * part.num_items for parts in rings.values() for part in parts)


@every_recipe
@every_width
def test_parts_lie_one_behind_the_other(precision, warpgroups):
    end = 0
    for part in budget(precision, warpgroups).parts.values():
        assert part.num_bytes > 0 and part.offset % part.alignment == 0
        assert end <= part.offset < end + part.alignment
        end = part.end
    assert budget(precision, warpgroups).total_bytes == end


#: Of the map's sizes: experts, ranks, rows that are pulled in pieces, stages. By day those of
#: `tests.unit.layers`, whose kernels other tests run: three recipes, with four stages or five.
SIZES = {
    "layers": ((layers.E, layers.K, layers.H, layers.I, layers.T, layers.W), {}),
    "small": ((8, 2, 256, 256, 16, 2), {}),
    "odd": ((9, 2, 384, 128, 16, 3), {"num_stages": 3}),
    "pieces": ((6, 2, 7168, 128, 16, 1), {"num_stages": 2, "pull_piece_bytes": 1024}),
}


@pytest.mark.compile
@pytest.mark.skipif(not HAVE_DSL, reason="kernels are built here")
@pytest.mark.parametrize(
    "precision", [name if name != "fp8_channel" else at_night(name) for name in one_packed()]
)
@pytest.mark.parametrize("size", [size if size == "layers" else at_night(size) for size in SIZES])
def test_a_launch_asks_for_the_bytes_of_the_map(precision, size):
    fields, overrides = SIZES[size]
    config = MoEConfig(*fields, precision)
    kernel = select(config, **overrides)
    built, asked = compile.load(config, kernel, cpu=True), []
    built.to_device(0)
    built.launches.on_launch = lambda code, grid, parameters, shared: asked.append(shared)
    built.launcher()(0, num_ctas=1)
    built.launches.check()
    assert asked == [budget_of(config, kernel).total_bytes]
