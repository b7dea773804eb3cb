"""The emulator follows the protocol: right numbers under hard routings and any interleaving."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from megamoe.emulator import (
    Deadlock,
    Emulator,
    EmulatorError,
    NotAtRest,
    PaddingNotInert,
    StepLimit,
    UnorderedAccess,
    UnwrittenRead,
)
from megamoe.faults import LaunchTimeout, MegaMoEError
from megamoe.precision import PRECISIONS
from megamoe.reference import Weights, quantize
from megamoe.shape import Shape
from tests.emulated import Layer, WrongResult
from tests.routing import ROUTINGS
from workspace import Workspace
from workspace.wire import COUNT_RECORD_BYTES, ROUTED_RECORD_BYTES

pytestmark = pytest.mark.usefixtures("one_thread")

FP8_RECIPES = ("fp8_block", "fp8_channel")


def over_recipes(worlds, block=(), channel=()):
    """Parameters (precision, world): the ranks that each recipe is tried with."""
    tried = {"bf16": worlds, "fp8_block": block, "fp8_channel": channel}
    return pytest.mark.parametrize(
        "precision,world", [(name, world) for name, some in tried.items() for world in some]
    )


@over_recipes([1, 2, 4, 8, 16], block=[1, 2, 8, 16], channel=[2])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_hard_routings(precision, world, routing):
    layer = Layer(world, tokens=6, top_k=3, hidden=384, inner=256, precision=precision)
    for seed in range(2):
        layer.check(routing, seed)
        layer.emulator.assert_at_rest()


def test_a_part_of_a_launch_needs_a_gpu():
    with pytest.raises(ValueError, match="only='gemms' needs a GPU"):
        Layer(1, overrides={"only": "gemms"})


def test_a_trace_needs_a_gpu():
    with pytest.raises(ValueError, match="trace=True needs a GPU"):
        Layer(1, overrides={"trace": True})


@over_recipes([1, 2, 4, 8], block=[4], channel=[2])
def test_many_interleavings(precision, world):
    """52 seeds on one workspace, each with another routing than the launch before."""
    layer = Layer(world, tokens=4, top_k=2, precision=precision)
    for seed in range(52):
        layer.check(ROUTINGS[seed % len(ROUTINGS)], seed)
        layer.emulator.assert_at_rest()


@pytest.mark.parametrize("pool_blocks", [1, 2, 3])
@over_recipes([1, 2], block=[2], channel=[2])
def test_a_small_ring_is_reused(precision, world, pool_blocks):
    overrides = {"pool_blocks": pool_blocks}
    layer = Layer(world, 8, experts=8 * world, overrides=overrides, precision=precision)
    for seed in range(6):
        layer.check("ragged" if seed == 3 else "uniform", seed)
        layer.emulator.assert_at_rest()


@pytest.mark.parametrize(
    "precision,num_ctas",
    [("bf16", 1), ("bf16", 2), ("bf16", 3), ("bf16", 4), ("fp8_block", 3), ("fp8_channel", 2)],
)
@pytest.mark.parametrize("routing", ["skewed", "all_to_one_expert"])
def test_experts_of_several_blocks(precision, num_ctas, routing):
    """More than block_m rows for one expert, through a ring that is smaller than the expert."""
    layer = Layer(
        2, 150, 2, hidden=128, inner=256, num_ctas=num_ctas, overrides={"pool_blocks": 2},
        precision=precision,
    )  # fmt: skip
    layer.check(routing, num_ctas)
    layer.emulator.assert_at_rest()


@pytest.mark.parametrize(
    "precision,chunk_bytes,pieces",
    [
        ("bf16", 768, 1), ("bf16", 400, 2), ("bf16", 256, 3), ("bf16", 100, 8),
        ("fp8_block", 384, 1), ("fp8_block", 200, 2), ("fp8_block", 50, 8), ("fp8_channel", 128, 3),
    ],
)  # fmt: skip
def test_rows_in_pieces(precision, chunk_bytes, pieces):
    """Also where a piece is narrower than the columns that an epilogue stores at once."""
    overrides = {"pull_chunk_bytes": chunk_bytes, "pool_blocks": 2}
    layer = Layer(2, hidden=384, experts=8, overrides=overrides, precision=precision)
    assert layer.emulator.ranks[0].pull_columns * pieces == 384
    for seed in range(4):
        layer.check("uniform", seed)


@over_recipes([2, 4, 8], block=[4], channel=[2])
def test_ranks_may_run_ahead(precision, world):
    """No meeting point between launches: a fast rank starts while peers still reduce."""
    overrides = {"pool_blocks": 2}
    layer = Layer(world, 4, experts=4 * world, overrides=overrides, precision=precision)
    for seed in range(6):
        layer.check_many(["uniform", "silent_rank", "ragged", "masked", "skewed"], seed)
        layer.emulator.assert_at_rest()


def test_ranks_do_run_ahead():
    """The test above is about something: launches of different ranks overlap."""
    layer = Layer(4, 4)
    ahead = 0

    def watch(state, launch, poison, refill):
        nonlocal ahead
        ahead = max(ahead, state.number - min(peer.number for peer in layer.emulator.ranks))
        refill(launch, poison)

    for state in layer.emulator.ranks:
        refill = state.refill
        state.refill = lambda a, b, state=state, refill=refill: watch(state, a, b, refill)
    layer.check_many(["uniform"] * 4, 0)
    assert ahead == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ep8_forward(precision):
    layer = Layer(8, tokens=16, top_k=4, experts=16, hidden=256, inner=256, precision=precision)
    layer.check("uniform", 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_clamped_activation(precision):
    layer = Layer(2, tokens=16, hidden=256, inner=256, precision=precision, clamp=0.3)
    layer.check("uniform", 0)
    layer.emulator.clamp = None  # of the comparison too
    inputs = layer.inputs("uniform", 1)
    free = layer.emulator.launch(*inputs)
    layer.emulator.clamp = 0.3
    with pytest.raises(WrongResult):
        layer.compare(free, inputs)


# Quantised input


def quantized(layer, xs):
    """(xs, x_scales)"""
    pairs = [quantize(x, layer.config.recipe.token_block) for x in xs]
    return [x for x, _ in pairs], [scale for _, scale in pairs]


@pytest.mark.parametrize("precision", FP8_RECIPES)
@pytest.mark.parametrize("routing", ["uniform", "ragged"])
def test_the_launch_quantises_as_the_caller_would(precision, routing):
    layer = Layer(4, hidden=384, precision=precision)
    xs, idx, weights = layer.inputs(routing, 1)
    ys = layer.emulator.launch(xs, idx, weights, seed=1)
    stored, scales = quantized(layer, xs)
    for rank, (x, scale) in enumerate(zip(stored, scales, strict=True)):
        views = layer.workspace.regions(rank)
        rows = views["input_token_buffer"][: len(x)]
        assert torch.equal(rows.view(torch.uint8), x.view(torch.uint8))
        assert torch.equal(views["input_sf_buffer"][: len(x), : scale.shape[1]], scale)
    again = layer.emulator.launch(stored, idx, weights, seed=2, x_scales=scales)
    assert all(torch.equal(a, b) for a, b in zip(ys, again, strict=True))


@pytest.mark.parametrize("precision", FP8_RECIPES)
def test_quantised_input_may_be_in_its_buffers(precision):
    layer = Layer(2, precision=precision)
    xs, idx, weights = layer.inputs("uniform", 0)
    stored, scales = quantized(layer, xs)
    views = [layer.workspace.regions(rank) for rank in range(2)]
    for rank in range(2):
        staged, width = views[rank]["input_token_buffer"], scales[rank].shape[1]
        stored[rank] = staged.copy_(stored[rank])
        scales[rank] = views[rank]["input_sf_buffer"][:, :width].copy_(scales[rank])
    outputs = layer.emulator.launch(stored, idx, weights, x_scales=scales)
    layer.compare(outputs, (xs, idx, weights))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_received_rows_are_counted(precision):
    layer = Layer(4, experts=8, precision=precision)
    xs, idx, weights = layer.inputs("masked", 0)
    counts = [torch.full((2,), rank, dtype=torch.int32) for rank in range(4)]
    counts[2] = None
    layer.emulator.launch(xs, idx, weights, expert_counts=counts)
    live = torch.cat([rows[rows >= 0] for rows in idx])
    rows = torch.bincount(live, minlength=8).view(4, 2)
    for rank in (0, 1, 3):
        assert torch.equal(counts[rank], (rows[rank] + rank).int())


def test_seed_decides_everything():
    def steps(seed):
        layer = Layer(2)
        inputs = layer.inputs("uniform", 0)
        order = []
        wake = layer.emulator.runtime._wake
        layer.emulator.runtime._wake = lambda word: (
            order.append((word.region, word.index)),
            wake(word),
        )
        outputs = layer.emulator.launch(*inputs, seed=seed)
        return order, outputs

    first, again, other = steps(1), steps(1), steps(2)
    assert first[0] == again[0] and first[0] != other[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_poison_is_not_needed():
    layer = Layer(2)
    inputs = layer.inputs("uniform", 0)
    layer.compare(layer.emulator.launch(*inputs, seed=0, poison=False), inputs)


def test_x_may_be_the_staging_buffer():
    layer = Layer(2)
    xs, idx, weights = layer.inputs("uniform", 0)
    staged = [layer.workspace.regions(rank)["input_token_buffer"] for rank in range(2)]
    for x, buffer in zip(xs, staged, strict=True):
        buffer.copy_(x)
    layer.compare(layer.emulator.launch(staged, idx, weights), (xs, idx, weights))


def test_outputs_are_what_the_workspace_holds():
    layer = Layer(2)
    outputs = layer.check("ragged", 1)
    for rank, output in enumerate(outputs):
        view = layer.workspace.regions(rank)["layer_output"]
        assert torch.equal(output, view[: len(output)])
        assert view[len(output) :].isnan().all()


@pytest.mark.parametrize(
    "precision,token_bytes", [("bf16", 768), ("fp8_block", 384 + 16), ("fp8_channel", 384 + 16)]
)
def test_nvlink_bytes(precision, token_bytes):
    """Rows, records, combine rows and signals of remote slots; count records of all experts, and
    the number of the layer.
    """
    layer = Layer(4, tokens=6, top_k=3, hidden=384, precision=precision)
    config = layer.config
    inputs = layer.inputs("masked", 3)
    layer.emulator.launch(*inputs, seed=3)
    remote = sum(
        ((idx >= 0) & (idx // config.experts_per_rank != rank)).sum().item()
        for rank, idx in enumerate(inputs[1])
    )
    row = token_bytes + config.hidden_size * 2  # there and back
    expected = remote * (ROUTED_RECORD_BYTES + 4 + row)  # 4: the arrival of a combine row
    expected += 4 * 3 * (config.experts_per_rank * COUNT_RECORD_BYTES + 4 + 2 * 4)
    assert layer.emulator.nvlink_bytes == expected


def test_nothing_crosses_without_peers():
    layer = Layer(1)
    layer.check("uniform", 0)
    assert layer.emulator.nvlink_bytes == 0


def test_invalid_experts_are_masked_and_reported():
    layer = Layer(2, tokens=4, top_k=2)
    xs, idx, weights = layer.inputs("uniform", 0)
    idx[0][1, 0], idx[1][3, 1] = layer.experts, -7
    outputs = layer.emulator.launch(xs, idx, weights, seed=0)
    assert layer.emulator.invalid_experts == [(0, 2, layer.experts), (1, 7, -7)]
    idx[0][1, 0] = idx[1][3, 1] = -1
    layer.compare(outputs, (xs, idx, weights))
    layer.check("uniform", 1)
    assert layer.emulator.invalid_experts == []


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expert_ids_of_both_widths(dtype):
    layer = Layer(2)
    xs, idx, weights = layer.inputs("masked", 0)
    idx = [rows.to(dtype) for rows in idx]
    layer.compare(layer.emulator.launch(xs, idx, weights), (xs, idx, weights))


# What a broken launch says


def test_deadlock_lists_who_waits_for_what():
    layer = Layer(2, drop="report.fc1_done")
    with pytest.raises(Deadlock) as error:
        layer.check("uniform", 0)
    target = Shape(layer.config, layer.layout.kernel, layer.layout).fc1_done
    line = f"rank 1, role load_tokens: waited for fc1_done_counter[0] to reach {target}, saw 0"
    assert line in str(error.value)
    assert isinstance(error.value, (LaunchTimeout, MegaMoEError))
    assert any(
        "role combine: waited for shared.reports_ended" in wait for wait in error.value.waits
    )


def test_unwritten_read_names_region_row_role_and_rank():
    layer = Layer(2, drop="load_tokens.fc2_wait")
    with pytest.raises(
        UnwrittenRead, match=r"rank \d, CTA \d, role load_tokens: read of fc1_output\[\d+\]"
    ):
        for seed in range(40):
            with suppress(UnorderedAccess):  # the rows, or their padding metadata, were there
                layer.check("all_to_one_expert", seed)
            layer.emulator.recover()


@pytest.mark.parametrize(
    "region,value", [("l1_topk_weights_buffer", 0.5), ("token_src_metadata", 1)]
)
def test_padding_must_be_inert(region, value):
    layer = Layer(2)
    layer.workspace.regions(1)[region][50] = value
    with pytest.raises(NotAtRest, match=f"rank 1: {region} is not zero"):
        layer.emulator.assert_at_rest()
    with pytest.raises(PaddingNotInert, match=rf"rank 1, CTA \d, role math: {region}\[50\] is"):
        layer.check("all_to_one_rank", 0)


def test_step_limit():
    layer = Layer(2)
    layer.emulator.runtime.max_steps = 100
    with pytest.raises(StepLimit, match="100 steps"):
        layer.check("uniform", 0)


def test_recover_after_a_failed_launch():
    layer = Layer(2, overrides={"pool_blocks": 1}, experts=8)
    layer.check("uniform", 0)
    layer.emulator.runtime.max_steps = 700
    with pytest.raises(StepLimit):
        layer.check("uniform", 1)
    with pytest.raises(EmulatorError, match="recover"):
        layer.check("uniform", 2)
    layer.emulator.recover()
    layer.emulator.assert_at_rest()
    for seed in range(3):
        layer.check("uniform", seed)
    layer.emulator.assert_at_rest()


def test_not_at_rest():
    layer = Layer(2)
    layer.check("uniform", 0)
    layer.workspace.regions(0)["fc1_done_counter"][1] = 3
    layer.workspace.regions(1)["nvlink_barrier_signal"][0, 0] += 1
    with pytest.raises(NotAtRest, match="fc1_done_counter is not zero.*signals"):
        layer.emulator.assert_at_rest()


def test_wrong_numbers_are_noticed():
    """The comparison is not vacuous: one expert's weights differ, by little."""
    layer = Layer(2)
    w13, w2 = layer.weights.w13, layer.weights.w2.clone()
    w2[0] *= 1.03
    layer.weights = Weights(w13, w2)
    with pytest.raises(AssertionError, match="relative error"):
        layer.check("uniform", 0)


@pytest.mark.parametrize("precision", FP8_RECIPES)
@pytest.mark.parametrize("name", ["w13_scale", "w2_scale"])
def test_wrong_scales_are_noticed(precision, name):
    """One scale differs, of the last weight block or channel of an expert: by little for a block,
    fourfold for one of a hundred channels.
    """
    layer = Layer(2, precision=precision)
    scale = getattr(layer.weights, name).clone()
    scale.view(scale.shape[0], -1)[0, -1] *= 1.1 if precision == "fp8_block" else 4.0
    layer.weights = layer.weights._replace(**{name: scale})
    with pytest.raises(AssertionError, match="relative error"):
        layer.check("uniform", 0)


# Arguments


def test_arguments_are_checked():
    layer = Layer(2)
    xs, idx, weights = layer.inputs("uniform", 0)
    with pytest.raises(ValueError, match="names no operation"):
        Emulator(layer.workspace, drop="dispatch.nothing")
    with pytest.raises(ValueError, match="names no region"):
        Emulator(layer.workspace, reset_regions=["l2_token_buffer"])
    with pytest.raises(ValueError, match="xs is given for 1 ranks"):
        layer.emulator.launch(xs[:1], idx, weights)
    with pytest.raises(ValueError, match="max_tokens_per_rank=5"):
        layer.emulator.launch([xs[0].repeat(2, 1), xs[1]], idx, weights)
    with pytest.raises(ValueError, match="x_scales is given for 1 ranks"):
        layer.emulator.launch(xs, idx, weights, x_scales=[None])
    with pytest.raises(ValueError, match="x has dtype"):
        layer.emulator.launch([xs[0].float(), xs[1]], idx, weights)
    with pytest.raises(ValueError, match="topk_idx has shape"):
        layer.emulator.launch(xs, [idx[0][:1], idx[1]], weights)
    with pytest.raises(ValueError, match="weights are given for 1 ranks"):
        layer.emulator.load_weights([layer.weights])
    with pytest.raises(EmulatorError, match="load_weights"):
        Emulator(Workspace(layer.layout)).launch(xs, idx, weights)


def test_a_second_emulator_continues_on_the_same_workspace():
    layer = Layer(2)
    layer.check("uniform", 0)
    weights = layer.emulator._weights
    layer.emulator = Emulator(layer.workspace, num_ctas=3)
    layer.emulator._weights = weights
    layer.emulator._install_weights()
    layer.check("uniform", 1)
    layer.emulator.assert_at_rest()
