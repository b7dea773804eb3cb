"""CUDA graphs: replay equals eager bit for bit, with other contents in the captured buffers, and
allocates nothing.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.harness import (
    assert_at_rest,
    capture,
    forward,
    inputs_of,
    launch,
    make_moe,
    poison,
    quantized,
    shared_moe,
)
from tests.routing import ROUTINGS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "name",
    [
        "small1",
        "small2",
        "small4",
        "small8",
        "block1",
        "block4",
        "channel4",
        "mxfp44",
        "mxfp4_token4",
        "int44",
        "shared4",
        "shared_block4",
        "shared_mxfp44",
    ],
)
def test_replay_equals_eager_with_other_contents(name):
    moe = shared_moe(name)
    tokens = 100
    buffers = inputs_of(moe, "uniform", seed=0, tokens=tokens)
    forward(moe, *buffers)
    graph, outputs = capture(moe, *buffers)
    for seed, routing in enumerate(ROUTINGS):
        fresh = inputs_of(moe, routing, seed=seed + 20, tokens=tokens)
        if any(a.shape != b.shape for a, b in zip(fresh[0], buffers[0], strict=True)):
            continue  # ragged: a graph has the token counts it was captured with
        expected = forward(moe, *fresh)
        for held, new in zip(buffers, fresh, strict=True):
            for a, b in zip(held, new, strict=True):
                a.copy_(b)
        poison(moe)
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        moe.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True)), routing
        assert_at_rest(moe)


@pytest.mark.parametrize("name", ["small1", "block1", "small4", "block4"])
def test_a_launch_waits_for_the_kernel_before_though_it_may_begin_beside_it(name):
    """Layers one after the other, each on the output of the one before, with nothing in between."""
    moe = shared_moe(name)
    first, ids, weights = inputs_of(moe, "uniform", seed=4, tokens=100)
    layers = [[torch.empty_like(x) for x in first] for _ in range(3)]  # SwiGLU squares: few
    outputs = [out for layer in layers for out in layer]

    def chain(between):
        xs = first
        for outs in layers:
            launch(moe, xs, ids, weights, out=outs)
            xs = outs
            between()

    chain(moe.synchronize)
    expected = [out.clone() for out in outputs]
    assert all(out.float().abs().max() > 0 for out in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for run in (lambda: chain(lambda: None), graph.replay):
        for _ in range(20):
            for out in outputs:
                out.fill_(float("nan"))
            run()
            moe.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


@pytest.mark.parametrize("name,stored", [("small4", False), ("block4", False), ("block4", True)])
def test_forward_allocates_nothing(name, stored):
    """Neither with an input that the launch quantises, nor (`stored`) with a quantised one."""
    moe = shared_moe(name)
    inputs = inputs_of(moe, "uniform", seed=1)
    scales = None
    if stored:
        xs, scales = quantized(moe, inputs[0])
        inputs = (xs, *inputs[1:])
    forward(moe, *inputs, scales)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        moe(*inputs, scales)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    moe.synchronize()


def test_a_launch_may_be_the_first_inside_a_capture():
    moe = make_moe("small2")
    inputs = inputs_of(moe, "skewed", seed=2)
    graph, outputs = capture(moe, *inputs)
    graph.replay()
    moe.synchronize()
    first = [output.clone() for output in outputs]
    assert all(torch.equal(a, b) for a, b in zip(forward(moe, *inputs), first, strict=True))
