"""Weights that change under a captured graph: new values are seen, other addresses refused."""

from __future__ import annotations

import pytest
import torch

from megamoe import reference
from tests.gpu import harness
from tests.gpu.harness import capture, forward, inputs_of, launch, make_moe, weights_of

pytestmark = pytest.mark.gpu

NAMES = ["small1", "small4", "block1", "block4", "channel4"]
PACKED = ["mxfp41", "mxfp44", "int44"]  # launches read a copy, which loading again writes in place


def other_weights(moe, seed: int) -> reference.Weights:
    """Weights with other values and, in FP8, other scales: those of the tests by factors that
    differ from expert to expert.
    """
    config = moe.config
    rng = torch.Generator("cuda").manual_seed(seed)
    factors = 0.5 + torch.rand(config.num_experts, 1, 1, device="cuda", generator=rng)
    plain = weights_of(config.num_experts, config.hidden_size, config.intermediate_size)
    w13, w2 = (
        (matrix.roll(seed, 0).float() * factors).bfloat16() for matrix in (plain.w13, plain.w2)
    )
    if config.precision == "bf16":
        return reference.Weights(w13, w2)
    return harness.quantize_weights(w13, w2, config.precision)


def clone(weights: reference.Weights) -> reference.Weights:
    return reference.Weights(*(None if t is None else t.clone() for t in weights))


def overwrite(given: reference.Weights, other: reference.Weights) -> None:
    for tensor, new in zip(given, other, strict=True):
        if tensor is not None:
            tensor.data.copy_(new)


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, how) for name in NAMES for how in ("load", "refresh")),
     *((name, "load") for name in PACKED)],
)  # fmt: skip
def test_replay_and_eager_see_new_values_in_the_same_tensors(name, how):
    moe = make_moe(name)
    given = clone(harness.all_weights(moe))
    moe.load_weights(*given)
    held = inputs_of(moe, "uniform", seed=3)
    forward(moe, *held)
    graph, outputs = capture(moe, *held)
    for seed in (1, 2):
        other = other_weights(moe, seed)
        fresh = make_moe(name)
        fresh.load_weights(*other)
        expected = forward(fresh, *held)
        overwrite(given, other)
        if how == "load":
            moe.load_weights(*given)
        else:
            moe.refresh_scales()
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        moe.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), "replay"
        again = forward(moe, *held)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), "eager"


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_refresh_brings_new_scales_with_every_replay(name):
    moe = make_moe(name)
    given = clone(harness.all_weights(moe))
    moe.load_weights(*given)
    held = inputs_of(moe, "uniform", seed=3)
    forward(moe, *held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe.refresh_scales()
        outputs = launch(moe, *held)
    other = other_weights(moe, 5)
    fresh = make_moe(name)
    fresh.load_weights(*other)
    expected = forward(fresh, *held)
    overwrite(given, other)
    graph.replay()
    moe.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("name", NAMES + PACKED)
def test_expert_rows_may_be_moved_in_what_the_kernel_reads(name):
    """As by an engine that balances load: rows of all kernel tensors, ids renamed, same results."""
    moe = make_moe(name)
    moe.load_weights(*clone(harness.all_weights(moe)))
    held = inputs_of(moe, "uniform", seed=3)
    expected = forward(moe, *held)
    graph, outputs = capture(moe, *held)
    order = torch.randperm(moe.config.num_experts, device="cuda")
    for _, tensor in moe.kernel_tensors():
        bits = tensor.view(torch.uint8)
        bits.copy_(bits[order].clone())
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device="cuda")
    for idx in held[1]:
        idx.copy_(torch.where(idx >= 0, place[idx.clamp_min(0)], idx))
    graph.replay()
    moe.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("name", ["small1", "block4", "channel4"])
def test_other_addresses_after_a_capture_are_refused(name):
    moe = make_moe(name)
    held = inputs_of(moe, "uniform", seed=3)
    expected = forward(moe, *held)
    version = moe.weights_version
    graph, outputs = capture(moe, *held)
    other = other_weights(moe, 1)
    with pytest.raises(ValueError, match="other addresses than those that a captured CUDA graph"):
        moe.load_weights(*other)
    graph.replay()
    moe.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert moe.weights_version == version
    moe.load_weights(*other, replace=True)
    assert moe.weights_version == version + 1
    fresh = make_moe(name)
    fresh.load_weights(*other)
    assert all(map(torch.equal, forward(moe, *held), forward(fresh, *held)))


@pytest.mark.parametrize("name", ["small1", "block4", "channel4", "mxfp44"])
def test_a_state_dict_brings_new_values_to_a_graph(name):
    moe = make_moe(name)
    moe.load_weights(*clone(harness.all_weights(moe)))
    held = inputs_of(moe, "uniform", seed=3)
    forward(moe, *held)
    graph, outputs = capture(moe, *held)
    other = other_weights(moe, 4)
    fresh = make_moe(name)
    fresh.load_weights(*other)
    expected = forward(fresh, *held)
    moe.load_state_dict({k: v.cpu() for k, v in fresh.state_dict().items()})
    graph.replay()
    moe.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
