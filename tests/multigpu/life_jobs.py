"""Jobs about a layer's life among other ranks: out of step, late, closed; what works afterwards."""

from __future__ import annotations

import gc
import os
import time

import torch
import torch.distributed as dist

from megamoe import InvalidExpertError
from tests.gpu import harness
from tests.multigpu import layer
from tests.multigpu.fault_jobs import _forward_until_right
from tests.multigpu.launcher import Context


def _layers(context: Context, name: str, count: int, **changes) -> tuple[list, tuple, list]:
    """(layers that share a workspace, inputs, what each makes of them); weights differ by layer."""
    first = layer.make(context, name, **changes)
    layers = [first]
    for number in range(1, count):
        other = layer.construct(context, name, workspace=first.workspace, **changes)
        weights = harness.all_weights(first)
        rolled = [None if t is None else layer.roll(t, number) for t in weights]
        layer.load_slice(other, context.rank, type(weights)(*rolled))
        layers.append(other)
    inputs = layer.inputs_of(context, first, "uniform", 4)
    context.meet()
    expected = [layer.forward(one, inputs) for one in layers]
    assert not torch.equal(expected[0], expected[1])
    context.meet()
    return layers, inputs, expected


def out_of_step(context: Context, name: str, odd: int) -> tuple[dict, list]:
    """Rank `odd` leaves out one layer's forward. (what came of it, errors until all is right)"""
    layers, inputs, expected = _layers(context, name, 3)

    def step(skip: int | None):
        for number, one in enumerate(layers):
            if number != skip:
                one(*inputs)
        layers[0].synchronize()

    seen = layer.attempt(lambda: step(1 if context.rank == odd else None))
    context.meet()
    retries = _forward_until_right(layers[2], inputs, expected[2])
    context.meet()
    for one, right in zip(layers, expected, strict=True):
        assert torch.equal(layer.forward(one, inputs), right)
    return seen, [one["error"] for one in retries]


def bad_expert_in_a_step(context: Context, name: str, bad: int) -> list[str]:
    """Rank `bad` names a wrong expert in one layer of one step, and nobody synchronises: later
    launches still match. What it raised where.
    """
    layers, inputs, expected = _layers(context, name, 4)
    x, idx, weights = inputs
    outs = [torch.empty_like(x) for _ in layers]
    raised = []
    for step in range(4):
        for number, one in enumerate(layers):
            wrong = idx.clone()
            if (context.rank, step, number) == (bad, 0, 2):
                wrong[5, 2] = one.config.num_experts
            outs[number].fill_(float("nan"))
            try:
                one(x, wrong, weights, out=outs[number])
            except InvalidExpertError as error:
                raised.append(f"{step > 0 or number > 2}: {error}")
            time.sleep(0.01)  # so that the record is there
        if step:
            torch.cuda.synchronize()
            for out, right in zip(outs, expected, strict=True):
                assert torch.equal(out, right), (context.rank, step)
    layers[0].synchronize()
    return raised


def recover_through_different_layers(context: Context, name: str, absent: int) -> list[dict]:
    """One rank misses a launch; then every rank comes back through another layer of the workspace.
    Errors of three synchronisations, through different layers too.
    """
    layers, inputs, expected = _layers(context, name, 3, timeout_s=layer.FAULT_TIMEOUT_S)
    if context.rank != absent:
        layers[1](*inputs)
    torch.cuda.synchronize()
    context.meet()
    seen = [layer.attempt(one.synchronize) for one in layers]
    context.meet()
    layers[context.rank % 3].recover()
    context.meet()
    for one, right in zip(layers, expected, strict=True):
        assert torch.equal(layer.forward(one, inputs), right)
    harness.assert_at_rest(layers[0])
    return seen


def late_start(context: Context, name: str, late: int, by_s: float, limits: dict) -> dict:
    """One rank launches `by_s` seconds after the others."""
    moe = layer.make(context, name, **limits)
    inputs = layer.inputs_of(context, moe, "uniform", 4)
    expected = layer.forward(moe, inputs)
    context.meet()
    if context.rank == late:
        time.sleep(by_s)
    seen = layer.attempt(lambda: layer.forward(moe, inputs))
    context.meet()
    _forward_until_right(moe, inputs, expected)
    return seen


def meet_first(context: Context, name: str, late: int) -> tuple[dict, float, dict]:
    """A meeting that one rank is late for, and one that it does not come to."""
    moe = layer.make(context, name)
    inputs = layer.inputs_of(context, moe, "uniform", 4)
    context.meet()
    if context.rank == late:
        time.sleep(1.0)
    first = layer.attempt(lambda: moe.meet(20.0))
    layer.forward(moe, inputs)
    context.meet()
    missed = layer.attempt(lambda: moe.meet(0.3) if context.rank != late else None)
    context.meet()
    if context.rank == late:
        moe.meet(5.0)  # the others have been there
    layer.forward(moe, inputs)
    return first, first["seconds"], missed


def memory_comes_back(context: Context, name: str, group_first: bool) -> list[int]:
    """Bytes of this GPU that are not free: before, and after three layers of a group of their own
    lived and ended. Two of them are alive at a time.
    """

    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        context.meet()
        free, total = torch.cuda.mem_get_info()
        return total - free

    inputs, seen = None, []
    for turn in range(4):
        group = dist.new_group(list(range(context.world)))
        first = layer.make(context, name, group=group)
        second = layer.make(context, name, group=group)
        inputs = inputs or layer.inputs_of(context, first, "uniform", 4)
        ys = [layer.forward(moe, inputs) for moe in (first, second, first)]
        assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2])
        context.meet()
        if group_first:
            dist.destroy_process_group(group)
        if turn % 2:
            first.close()
            second.close()
        del first, second
        if not group_first:
            dist.destroy_process_group(group)
        seen.append(used())
    return seen


def early_exit(context: Context, name: str, leaves: int) -> dict:
    """One rank closes its layer, and its process ends; what the others see, and whether they can
    close theirs.
    """
    moe = layer.make(context, name, layer.FAULT_TIMEOUT_S)
    inputs = layer.inputs_of(context, moe, "uniform", 4)
    layer.forward(moe, inputs)
    context.meet()
    if context.rank == leaves:
        moe.close()
        os._exit(0)
    seen = layer.attempt(lambda: layer.forward(moe, inputs))
    closed = layer.attempt(moe.close)
    alive = torch.ones(1000, device=context.device).sum().item() == 1000
    return {"seen": seen, "closed": closed, "alive": alive}
