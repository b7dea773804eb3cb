"""Launches of the kernel on the machine: right numbers and no races under hard routings and any
interleaving, and what a launch that fails says.
"""

from __future__ import annotations

import pytest
import torch

from megamoe.backends import in_places
from megamoe.faults import InvalidExpertError, LaunchTimeout
from megamoe.kernels.sm90 import few_tokens
from megamoe.kernels.sm90.swapped import SWAPPED_TOKENS
from megamoe.machine.faults import Fault, StepLimit
from megamoe.precision import PRECISIONS
from megamoe.reference import Weights, quantize
from megamoe.wire import COUNT_RECORD_BYTES, ROUTED_RECORD_BYTES
from tests.machine import RING, Layer, WrongResult
from tests.mutants import Mutator, watch
from tests.nights import at_night, one_packed
from tests.routing import ROUTINGS

pytestmark = pytest.mark.usefixtures("one_thread")

#: Operations of the machine that the async proxy performs.
COPIES = ("load_bulk", "load_tensor", "store_bulk")
FP8_RECIPES = [name for name, recipe in PRECISIONS.items() if recipe.tokens.has_scales]


@pytest.fixture(scope="module", params=one_packed())
def ring(request) -> Layer:
    return Layer(**RING, precision=request.param)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_hard_routings(ring, routing):
    for seed in range(2):
        ring.check(routing, seed)
        ring.assert_at_rest()


@pytest.mark.parametrize("policy", ["eager", "late", "tardy", "random"])
def test_policies(ring, policy):
    ring.backend.settings["policy"] = policy
    for share in (0, 50, 100):
        ring.backend.settings["held_share"] = share
        ring.check("skewed", share + 1)
    ring.backend.settings |= {"policy": "random", "held_share": 0}


def test_ranks_may_run_ahead(ring):
    """No meeting point between launches: a fast rank starts while peers still reduce."""
    for seed in range(1, 3):
        ring.check_many(["uniform", "silent_rank", "ragged", "masked", "skewed"], seed)
        ring.assert_at_rest()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["late", "tardy", "random"])
def test_hundreds_of_interleavings(ring, policy):
    settings = dict(ring.backend.settings)
    for seed in range(100):
        ring.backend.settings |= {"policy": policy, "held_share": seed % 3 * 50}
        ring.check(ROUTINGS[seed % len(ROUTINGS)], seed)
        ring.assert_at_rest()
    ring.backend.settings = settings


@pytest.mark.parametrize(
    "precision,world",
    [
        ("bf16", 8),
        at_night("fp8_block", 8),
        at_night("bf16", 16),
    ],
)
def test_many_ranks(precision, world):
    layer = Layer(world, 6, 3, hidden=256, inner=256, precision=precision)
    for seed, routing in enumerate(("uniform", "skewed", "ragged")):
        layer.check(routing, seed)
        layer.assert_at_rest()


@pytest.mark.parametrize(
    ("precision", "num_ctas"),
    [
        at_night("bf16", 1),
        at_night("bf16", 3),
        ("fp8_block", 3),
        at_night("fp8_channel", 2),
        at_night("fp8_mxfp4", 3),
        at_night("fp8_mxfp4_token", 3),
        at_night("fp8_int4", 3),
    ],
)
def test_experts_of_several_blocks(precision, num_ctas):
    """More than block_m rows for one expert, through a ring that is smaller than the expert."""
    layer = Layer(
        2, 150, inner=256, num_ctas=num_ctas, overrides={"pool_blocks": 2}, precision=precision
    )
    for routing in ("skewed", "all_to_one_expert"):
        layer.check(routing, num_ctas)
        layer.assert_at_rest()


#: Rows of an expert: none, one, and both sides of where a tile takes another variant.
ROWS = (1, 16, 0, 17, 32, 33, 48, 49, 64, 65, 96, 97, 128)


def layer_of_rows(precision: str) -> Layer:
    """An expert for each of ROWS; K = 1."""
    return Layer(
        1, sum(ROWS), 1, len(ROWS), hidden=384, inner=256, precision=precision,
        overrides={"pool_blocks": 3},
    )  # fmt: skip


@pytest.mark.parametrize(
    "precision",
    [
        *(at_night(p) for p in ("bf16", "fp8_channel", "fp8_mxfp4", "fp8_int4")),
        "fp8_block", "fp8_mxfp4_token",
    ],
)  # fmt: skip
def test_every_number_of_tokens_of_a_tile(precision):
    for variants in (SWAPPED_TOKENS, few_tokens.VARIANTS):
        most = [rows for rows in ROWS if rows <= variants[-1]]
        assert {min(n for n in variants if n >= rows) for rows in most} == {*variants}
    layer = layer_of_rows(precision)
    layer.spread_scales()
    inputs = xs, [idx], weights = layer.inputs("uniform", 1)
    experts = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))
    idx[:, 0] = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(1))]
    layer.compare(layer.forward(inputs, 1), inputs)
    layer.assert_at_rest()


@pytest.mark.parametrize("precision", ["fp8_block", at_night("fp8_channel")])
def test_bits_of_a_token_do_not_depend_on_how_many_there_are(precision):
    layer = layer_of_rows(precision)
    xs, [idx], weights = layer.inputs("uniform", 2)
    idx[:, 0] = 3
    known = None
    for rows in (130, 100, 64, 40, 20, 1):
        idx[rows:] = -1
        [y] = layer.forward((xs, [idx], weights), rows)
        known = y[:1] if known is None else known
        assert y[0].any() and torch.equal(y[:1], known), rows


@pytest.mark.parametrize(("piece_bytes", "pieces"), [(400, 2), (100, 8)])
def test_rows_in_pieces(piece_bytes, pieces):
    overrides = {"pull_piece_bytes": piece_bytes, "pool_blocks": 2}
    layer = Layer(2, hidden=384, experts=8, overrides=overrides)
    for seed in range(2):
        layer.check("uniform", seed)


def test_regions_are_accessed_as_the_table_says(ring):
    code = watch(ring)
    ring.check("uniform", 1)
    seen = Mutator(ring, code)
    atomic, copied = seen.regions_of("atom"), seen.regions_of(*COPIES)
    code.seen = None
    regions = ring.workspace.layout.regions.values()
    declared = {region.name for region in regions if region.atomic}
    assert atomic == declared - {"abort_flag"}  # no launch has failed
    assert copied == {region.name for region in regions if region.bulk}


def test_seed_decides_everything(ring):
    inputs = ring.inputs("uniform", 0)
    seen = []
    for seed in (3, 3, 4):
        ys = [y.clone() for y in ring.forward(inputs, seed)]
        seen.append((ring.backend.machine.steps, ys))
    assert seen[0][0] == seen[1][0] != seen[2][0]
    for _, ys in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ys, seen[0][1], strict=True))


@pytest.mark.parametrize("precision", one_packed(FP8_RECIPES))
def test_the_launch_quantises_as_the_caller_would(precision):
    layer = Layer(**RING, precision=precision)
    xs, *routing = layer.inputs("ragged", 1)
    ys = [y.clone() for y in layer.forward((xs, *routing))]
    pairs = [quantize(x, layer.config.recipe.tokens.scale_columns) for x in xs]
    for rank, (x, scale) in enumerate(pairs):
        views = layer.workspace.regions(rank)
        rows = views["input_token_buffer"][: len(x)]
        travels = in_places(x) if layer.config.recipe.weights.packed else x
        assert torch.equal(rows.view(torch.uint8), travels.view(torch.uint8))
        assert torch.equal(views["input_scale_buffer"][: len(x), : scale.shape[1]], scale)
    again = layer.moe([x for x, _ in pairs], *routing, [scale for _, scale in pairs])
    assert all(torch.equal(a, b) for a, b in zip(ys, again, strict=True))


def test_nvlink_bytes(ring):
    """Rows, records, combine rows and signals of remote slots; count records of all experts, and
    the number of the layer.
    """
    config = ring.config
    _, idx, _ = inputs = ring.inputs("masked", 3)
    ring.forward(inputs)
    remote = sum(
        ((rows >= 0) & (rows // config.experts_per_rank != rank)).sum().item()
        for rank, rows in enumerate(idx)
    )
    token = 768 if config.precision == "bf16" else 384 + 16
    expected = remote * (ROUTED_RECORD_BYTES + 4 + token + 768)  # 4: the arrival of a combine row
    expected += 2 * (config.local_experts * COUNT_RECORD_BYTES + 4 + 2 * 4)
    assert ring.moe.nvlink_bytes == expected


def test_poison_is_left_where_nobody_writes(ring):
    ring.forward(ring.inputs("uniform", 0))
    for name in ("l1_token_buffer", "fc1_output", "routed_record"):
        bytes_of = ring.workspace.regions(1)[name].view(torch.uint8)
        assert (bytes_of == 0xFF).sum() > 100


# Failures


def test_a_missing_rank_is_named_by_the_kernel(ring, monkeypatch):
    """As on a GPU: every wait times out, and the workspace recovers."""
    launch = ring.backend.launch
    monkeypatch.setattr(
        ring.backend, "launch", lambda index, *rest: index == 1 or launch(index, *rest)
    )
    with pytest.raises(
        LaunchTimeout, match=r"rank 0, role count: waited for nvlink_barrier_signal\[1\] to reach"
    ):
        ring.check("uniform", 0)
    monkeypatch.undo()
    ring.check("uniform", 1)
    ring.assert_at_rest()


def test_invalid_experts_are_masked_and_reported(ring):
    for _ in range(2):  # in every launch anew
        xs, idx, weights = ring.inputs("uniform", 0)
        idx[0][1, 0] = ring.experts
        with pytest.raises(InvalidExpertError, match=r"topk_idx\[1, 0\] = 12 on rank 0"):
            ring.forward((xs, idx, weights))
        idx[0][1, 0] = -1
        ring.compare(ring.backend.outputs, (xs, idx, weights))
    ring.check("uniform", 1)


def test_a_failed_launch_is_recovered_from(ring):
    ring.backend.settings["max_steps"] = 30_000
    with pytest.raises(StepLimit, match="30000 instructions"):
        ring.check("uniform", 1)
    ring.backend.settings["max_steps"] = 0
    ring.check("uniform", 2)
    ring.assert_at_rest()


def test_wrong_numbers_are_noticed(ring):
    """The comparison is not vacuous: one expert's weights differ, by little."""
    right = ring.weights
    inputs = ring.inputs("uniform", 0)
    outputs = ring.forward(inputs)
    if ring.config.recipe.tokens.has_scales:
        scale = right.w2_scale.clone()
        if ring.config.recipe.weights.scales_values:
            scale[0, ::16] += 1  # exponents: twice as much, in few channels
        else:
            scale.view(scale.shape[0], -1)[0] *= 1.2
        ring.weights = right._replace(w2_scale=scale)
    else:
        ring.weights = Weights(right.w13, right.w2 * torch.tensor([1.2] + [1] * 11)[:, None, None])
    with pytest.raises(WrongResult):
        ring.compare(outputs, inputs)
    ring.weights = right


def test_a_read_that_leads_out_of_its_tensor_is_refused(ring):
    named = ring.backend.weights[0]
    ring.backend.weights[0] = named | {"w2": named["w2"][:-1]}
    words = "lie in no tensor; near: w2 of rank 0"
    if ring.config.recipe.weights.packed:  # which come by bulk copies, without a map
        words = r"load_weights\): .* in bulk_load .*: no memory there"
    with pytest.raises(Fault, match=words):
        ring.check("uniform", 0)
    ring.backend.weights[0] = named
    ring.check("uniform", 0)
