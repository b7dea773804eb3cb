"""Many launches back to back with changing routing, eager and graph replays mixed."""

from __future__ import annotations

import random
import time

import torch

from tests.gpu import harness
from tests.multigpu import layer
from tests.multigpu.launcher import Context
from tests.routing import ROUTINGS

CASES = 36
TOKENS = 48
#: Launches between two meetings of the hosts, at which memory is poisoned.
BETWEEN_POISONS = 193
DELAY_CHANCE, MAX_DELAY_S = 0.02, 0.0005
PROGRESS_S = 30.0


def stress(context: Context, name: str, launches: int, seconds: float, seed: int) -> dict:
    """At least `launches` launches, and as many as fit into `seconds`; every output is compared.

    What is launched follows from `seed` and is the same on every rank; when, differs.
    """
    moe = layer.make(context, name)
    choose, delays = random.Random(seed), random.Random(1000 * seed + context.rank + 1)
    cases, full = [], []
    for number in range(CASES):
        routing = ROUTINGS[number % len(ROUTINGS)]
        everyone = harness.inputs_of(moe, routing, number, TOKENS)
        inputs = tuple(part[context.rank] for part in everyone)
        expected = layer.forward(moe, inputs)
        layer.assert_correct(moe, expected, inputs)
        cases.append((inputs, expected))
        if all(len(x) == TOKENS for x in everyone[0]):  # the same choice on every rank
            full.append(cases[-1])

    held = tuple(part.clone() for part in full[0][0])
    graph, replayed = layer.capture(moe, held)
    wrong = torch.zeros((), dtype=torch.int64, device=context.device)
    started = shown = time.monotonic()
    done = 0
    while not _ends(context, done, launches, started + seconds):
        layer.poison_together(context, moe)
        for _ in range(BETWEEN_POISONS):
            if delays.random() < DELAY_CHANCE:
                time.sleep(delays.uniform(0, MAX_DELAY_S))
            if choose.random() < 0.5:
                inputs, expected = choose.choice(full)
                torch._foreach_copy_(held, inputs)
                graph.replay()
                out = replayed
            else:
                inputs, expected = choose.choice(cases)
                out = moe(*inputs)
            wrong += (out != expected).any()
            done += 1
        if context.rank == 0 and time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            print(f"{name}: {done} launches in {shown - started:.0f} s", flush=True)
    moe.synchronize()
    elapsed = time.monotonic() - started
    assert wrong.item() == 0, f"{wrong.item()} outputs differ in {done} launches"
    harness.assert_at_rest(moe)
    return {"launches": done, "seconds": elapsed}


def _ends(context: Context, done: int, launches: int, deadline: float) -> bool:
    """Rank 0's clock decides for all."""
    key = f"task/{context.task}/stop/{done}"
    if context.rank == 0:
        stop = done >= launches and time.monotonic() >= deadline
        context.store.set(key, str(int(stop)))
    context.meet()
    return context.store.get(key) == b"1"
