"""A layer's life beside others: streams, autograd, outputs that would overlap, its end."""

from __future__ import annotations

import gc

import pytest
import torch

from megamoe import module
from tests.gpu.harness import assert_correct, capture, forward, inputs_of, launch, make_moe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["small1", "block1"])
def test_an_output_that_would_overlap_its_input_is_refused(name):
    moe = make_moe(name)
    [x], [idx], [weights] = inputs_of(moe, "uniform", seed=2)
    y = moe(x, idx, weights)
    with pytest.raises(ValueError, match="the output and x overlap: pass out="):
        moe(y[1:], idx[1:], weights[1:])
    z = moe(y[1:], idx[1:], weights[1:], out=torch.empty_like(y[1:]))
    moe.synchronize()
    expected = forward(moe, [y[1:].clone()], [idx[1:]], [weights[1:]])
    assert torch.equal(z, expected[0])


@pytest.mark.parametrize("name", ["small1", "small4", "block4"])
def test_autograd_keeps_nothing_alive(name):
    moe = make_moe(name)
    xs, ids, weights = inputs_of(moe, "uniform", seed=2, tokens=64)
    expected = forward(moe, xs, ids, weights)
    linear = torch.nn.Linear(xs[0].shape[1], xs[0].shape[1], dtype=torch.bfloat16, device="cuda")

    def step():
        return launch(moe, [linear(x) for x in xs], ids, weights)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        ys = step()
    with pytest.raises(RuntimeError, match="forward only"):
        ys[0].float().sum().backward()
    del ys
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    with torch.inference_mode():
        again = forward(moe, xs, ids, weights)
    assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("how", ["close", "del"])
@pytest.mark.parametrize("name", ["small1", "small4", "block4"])
def test_a_layer_that_goes_while_its_launch_runs_on_another_stream(name, how):
    """Its memory is used again at once; the launch must have ended before."""
    reference = make_moe(name)
    xs, ids, weights = inputs_of(reference, "uniform", seed=6)
    expected = forward(reference, xs, ids, weights)
    outs = [torch.empty_like(x) for x in xs]
    side = torch.cuda.Stream()
    for _ in range(10):
        moe = make_moe(name)
        for out in outs:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # some 10 ms: the launch runs after all that follows
            launch(moe, xs, ids, weights, out=outs)
        size = moe.workspace.total_bytes
        if how == "close":
            moe.close()
        del moe
        gc.collect()
        for _ in range(reference.num_ranks):
            torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        assert all(map(torch.equal, outs, expected))


def test_a_layer_that_goes_between_the_launches_of_ranks_is_not_waited_for(monkeypatch):
    """The garbage collector may end a layer at any time: to wait for the GPU there, between the
    launch of rank 0 and that of rank 1 for which it waits, would last until they time out.
    """
    moe, cycle = make_moe("small4"), [make_moe("small1")]
    cycle.append(cycle)
    inputs = inputs_of(moe, "uniform", seed=3)
    expected = forward(moe, *inputs)
    ends, launch_rank = [], moe.backend.launch

    def close():
        ends.append(backend)
        torch.cuda.synchronize()

    def collect_and_launch(index, *arguments, **options):
        if index == 1:
            cycle.clear()
            gc.collect()
        return launch_rank(index, *arguments, **options)

    backend = cycle[0].backend
    monkeypatch.setattr(backend, "close", close)
    monkeypatch.setattr(moe.backend, "launch", collect_and_launch)
    again = forward(moe, *inputs)
    assert all(map(torch.equal, again, expected))
    assert not ends
    make_moe("small1").close()
    assert ends == [backend]


def test_memory_comes_back():
    make_moe("small4").close()  # what is made once: streams of torch, kernels
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with make_moe("small4") as moe:
            inputs = inputs_of(moe, "uniform", seed=1)
            assert_correct(moe, forward(moe, *inputs), *inputs)
        del moe, inputs
        gc.collect()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("name", ["ranks33", "ranks48", "ranks72"])
def test_more_ranks_than_torch_has_streams(name):
    """torch hands out 32 streams; the ranks have some of their own."""
    moe = make_moe(name)
    for seed in range(3):
        inputs = inputs_of(moe, "uniform", seed=seed)
        assert_correct(moe, forward(moe, *inputs), *inputs)
    fresh = inputs_of(moe, "skewed", seed=5)
    expected = forward(moe, *fresh)
    graph, outputs = capture(moe, *fresh)
    for _ in range(20):
        graph.replay()
    moe.synchronize()
    assert all(map(torch.equal, outputs, expected))
    moe.close()


def test_sms_that_a_layer_leaves_free_are_free_between_its_launches():
    """A launch that waits for the one before it (programmatic dependent launch) would sit on them,
    and a kernel of another stream that needs an SM a CTA would wait for a whole launch.
    """
    total = torch.cuda.get_device_properties(0).multi_processor_count
    busy, other = make_moe("timed1", num_sms=100), make_moe("small1", num_sms=total - 100)
    held = [part[0] for part in inputs_of(busy, "uniform", seed=1)]
    small = [part[0] for part in inputs_of(other, "uniform", seed=1)]
    out, small_out = torch.empty_like(held[0]), torch.empty_like(small[0])
    busy(*held, out=out)
    other(*small, out=small_out)
    torch.cuda.synchronize()
    assert busy.backend.launchers[0].values["dependents"].value == 0
    side, launches = torch.cuda.Stream(), 20
    began, ended, slept, done = (torch.cuda.Event(enable_timing=True) for _ in range(4))
    longest = {}
    for early in (1, 0):  # as it would be, for comparison; as it is
        busy.backend.launchers[0].set(dependents=early)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                busy(*held, out=out)
        delays = []
        for turn in range(17):
            began.record()
            graph.replay()
            ended.record()
            with torch.cuda.stream(side):
                torch.cuda._sleep(2_000_000 + 100_000 * turn)  # into the chain, at any phase
                slept.record()
                other(*small, out=small_out)
                done.record()
            torch.cuda.synchronize()
            delays.append(slept.elapsed_time(done))
        launch, longest[early] = began.elapsed_time(ended) / launches, max(delays[1:])
        print(f"early={early}: a launch {launch:.2f} ms, the other kernel {longest[early]:.2f} ms")
    assert longest[0] < 0.6 * launch, longest
    busy.synchronize()
    other.synchronize()


def test_a_layer_that_goes_inside_a_capture_is_waited_for_later():
    """A capture cannot wait, and a garbage collection may come at any time."""
    moe, stays = make_moe("small1"), make_moe("small1")
    [x], [idx], [weights] = inputs_of(stays, "uniform", seed=1)
    expected = stays(x, idx, weights).clone()
    gone = make_moe("small1")
    gone(x, idx, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = stays(x, idx, weights)
        with pytest.raises(ValueError, match="close.. waits for launches"):
            moe.close()
        del gone
        gc.collect()
    assert len(module._waiting) == 1
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    moe.close()
    assert not module._waiting
