"""Jobs in which a rank does not do its part: what the others see, and what works afterwards."""

from __future__ import annotations

import os
import signal
import time

import torch

from tests.gpu import harness
from tests.multigpu import layer
from tests.multigpu.launcher import Context

LATE_S = 3.0
MAX_RETRIES = 3


def _warm(context: Context, name: str):
    """(module, inputs, expected) after a good launch."""
    moe = layer.shared(context, name, layer.FAULT_TIMEOUT_S)
    inputs = layer.inputs_of(context, moe, "uniform", 4)
    context.meet()  # the timeout is short: nobody may be late by chance
    expected = layer.forward(moe, inputs)
    layer.assert_correct(moe, expected, inputs)
    context.meet()
    return moe, inputs, expected


def _forward_until_right(moe, inputs, expected) -> list[dict]:
    """Forwards until one succeeds; that one must be right."""
    attempts, outputs = [], []
    while len(attempts) < MAX_RETRIES and (not attempts or attempts[-1]["error"]):
        attempts.append(layer.attempt(lambda: outputs.append(layer.forward(moe, inputs))))
    assert outputs, attempts
    assert torch.equal(outputs[0], expected)
    return attempts


def absent(context: Context, name: str, absent: int, how: str) -> tuple[dict, list[dict]]:
    """One rank misses a launch. (the first attempt, those until a forward succeeds)."""
    moe, inputs, expected = _warm(context, name)

    def call():
        if context.rank == absent:
            if how == "skips":
                return
            if how == "raises":  # a wrong argument, before anything is launched
                moe(inputs[0][:, :-1], *inputs[1:])
            time.sleep(LATE_S)
        layer.forward(moe, inputs)

    first = layer.attempt(call)
    context.meet()
    retries = _forward_until_right(moe, inputs, expected)
    context.meet()
    for _ in range(3):
        assert torch.equal(layer.forward(moe, inputs), expected)
    harness.assert_at_rest(moe)
    return first, retries


def invalid_expert(context: Context, name: str, bad_rank: int) -> dict:
    """A bad expert id on one rank: an error there, right results everywhere, no recovery."""
    moe, (x, idx, weights), expected = _warm(context, name)
    wrong = idx.clone()
    if context.rank == bad_rank:
        wrong[5, 2] = moe.config.num_experts
    seen = layer.attempt(lambda: layer.forward(moe, (x, wrong, weights)))
    context.meet()
    assert torch.equal(layer.forward(moe, (x, idx, weights)), expected)
    harness.assert_at_rest(moe)
    return seen


def unrecovered_replay(context: Context, name: str, absent: int) -> tuple[dict, dict]:
    """Replays after a replay that one rank missed. (the failing one, the one after it)."""
    moe, inputs, expected = _warm(context, name)
    graph, out = layer.capture(moe, inputs)

    def replay():
        graph.replay()
        moe.synchronize()

    replay()
    assert torch.equal(out, expected)
    context.meet()
    first = layer.attempt(replay if context.rank != absent else lambda: None)
    context.meet()
    second = layer.attempt(replay)
    context.meet()
    moe.recover()
    out.fill_(float("nan"))
    replay()
    assert torch.equal(out, expected)
    assert torch.equal(layer.forward(moe, inputs), expected)
    harness.assert_at_rest(moe)
    return first, second


def crowded(context: Context, name: str, crowded: int, size: int) -> dict:
    """Another stream holds every SM of one GPU (one large matrix product) when a launch comes."""
    moe, inputs, expected = _warm(context, name)
    done, side = torch.cuda.Event(), torch.cuda.Stream()
    held_s = 0.0
    if context.rank == crowded:
        operand = torch.full((size, size), 1e-3, dtype=torch.bfloat16, device=context.device)
        product = torch.empty_like(operand)
        torch.mm(operand[:1024], operand, out=product[:1024])
        torch.cuda.synchronize()
        started = time.monotonic()
        torch.mm(operand, operand, out=product)
        torch.cuda.synchronize()
        held_s = time.monotonic() - started
    context.meet()
    if context.rank == crowded:
        with torch.cuda.stream(side):
            torch.mm(operand, operand, out=product)
            done.record()
    started = time.monotonic()
    out = moe(*inputs)
    overlapped = context.rank == crowded and not done.query()
    moe.synchronize()
    forward_s = time.monotonic() - started
    assert torch.equal(out, expected)
    harness.assert_at_rest(moe)
    return {"overlapped": overlapped, "held_s": held_s, "forward_s": forward_s}


def victim(context: Context, name: str, victim: int, how: str, launches: int) -> dict:
    """One rank dies after `launches` launches of a fresh module; what its survivors see."""
    moe = layer.make(context, name, layer.FAULT_TIMEOUT_S)
    inputs = layer.inputs_of(context, moe, "uniform", 4)
    context.meet()
    for _ in range(launches):
        moe(*inputs)
    moe.synchronize()
    context.meet()
    if context.rank == victim:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)

    def torch_works() -> bool:
        return torch.ones(1000, device=context.device).sum().item() == 1000

    first = layer.attempt(lambda: layer.forward(moe, inputs))
    alive = torch_works()
    print(f"rank {context.rank} survived: {first['message']}", flush=True)
    second = layer.attempt(lambda: layer.forward(moe, inputs))
    return {"first": first, "second": second, "alive": alive and torch_works()}
