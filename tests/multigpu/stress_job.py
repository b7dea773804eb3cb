"""Many launches back to back with changing routing: eager and graph replays, weights that change
under the graph, batches that a rank refuses.
"""

from __future__ import annotations

import random
import time

import torch

from megamoe import PeerFailed
from megamoe.reference import Weights
from tests.gpu import harness
from tests.multigpu import layer
from tests.multigpu.launcher import Context
from tests.routing import ROUTINGS

CASES = 36
TOKENS = 48
#: Launches between two meetings of the hosts, at which memory is poisoned.
BETWEEN_POISONS = 193
DELAY_CHANCE, MAX_DELAY_S = 0.02, 0.0005
UPDATE_CHANCE, REFUSE_CHANCE = 0.01, 0.0005
PROGRESS_S = 30.0


class Changing:
    """The weights of this rank's experts, in tensors that keep their addresses: set 0 or 1."""

    def __init__(self, context: Context, moe):
        local = moe.config.local_experts
        mine = slice(context.rank * local, (context.rank + 1) * local)
        weights = harness.all_weights(moe)
        rolled = Weights(*(None if t is None else layer.roll(t, 1) for t in weights))
        self.sets = [weights.of(mine), rolled.of(mine)]
        self.held = Weights(*(None if t is None else t.clone() for t in self.sets[0]))
        self.moe, self.now = moe, 0
        moe.load_weights(*self.held)

    def take(self, number: int, load: bool) -> None:
        self.now = number
        for tensor, new in zip(self.held, self.sets[number], strict=True):
            if tensor is not None:
                tensor.data.copy_(new)
        if load:
            self.moe.load_weights(*self.held)
        else:
            self.moe.refresh_scales()


def stress(context: Context, name: str, launches: int, seconds: float, seed: int) -> dict:
    """At least `launches` launches, and as many as fit into `seconds`; every output is compared.

    What is launched follows from `seed` and is the same on every rank; when, differs.
    """
    moe = layer.construct(context, name)
    weights = Changing(context, moe)
    choose, delays = random.Random(seed), random.Random(1000 * seed + context.rank + 1)
    cases, full = [], []
    for number in range(CASES):
        routing = ROUTINGS[number % len(ROUTINGS)]
        everyone = harness.inputs_of(moe, routing, number, TOKENS)
        inputs = tuple(part[context.rank] for part in everyone)
        weights.take(1, load=True)
        other = layer.forward(moe, inputs)
        weights.take(0, load=True)
        expected = layer.forward(moe, inputs)
        layer.assert_correct(moe, expected, inputs)
        cases.append((inputs, (expected, other)))
        if all(len(x) == TOKENS for x in everyone[0]):  # the same choice on every rank
            full.append(cases[-1])

    held = tuple(part.clone() for part in full[0][0])
    graph, replayed = layer.capture(moe, held)
    wrong = torch.zeros((), dtype=torch.int64, device=context.device)
    started = shown = time.monotonic()
    done = updates = refusals = 0
    while not _ends(context, done, launches, started + seconds):
        layer.poison_together(context, moe)
        for _ in range(BETWEEN_POISONS):
            if delays.random() < DELAY_CHANCE:
                time.sleep(delays.uniform(0, MAX_DELAY_S))
            if choose.random() < UPDATE_CHANCE:
                weights.take(1 - weights.now, load=choose.random() < 0.5)
                updates += 1
            if choose.random() < REFUSE_CHANCE:
                inputs = choose.choice(cases)[0]
                _refuse(context, moe, inputs, choose.randrange(context.world))
                refusals += 1
            if choose.random() < 0.5:
                inputs, expected = choose.choice(full)
                torch._foreach_copy_(held, inputs)
                graph.replay()
                out = replayed
            else:
                inputs, expected = choose.choice(cases)
                out = moe(*inputs)
            wrong += (out != expected[weights.now]).any()
            done += 1
        if context.rank == 0 and time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            print(f"{name}: {done} launches in {shown - started:.0f} s", flush=True)
    moe.synchronize()
    elapsed = time.monotonic() - started
    assert wrong.item() == 0, f"{wrong.item()} outputs differ in {done} launches"
    harness.assert_at_rest(moe)
    return {"launches": done, "seconds": elapsed, "updates": updates, "refusals": refusals}


def _refuse(context: Context, moe, inputs, rank: int) -> None:
    """One rank refuses its input, the others' launch ends; the workspace is recovered, because the
    next launch may be a replay, which does not do it.
    """
    x, idx, router = inputs
    if context.rank == rank:
        x = x[:, :-1]
    seen = layer.attempt(lambda: (moe(x, idx, router), moe.synchronize()))
    expected = "ValueError" if context.rank == rank else PeerFailed.__name__
    assert seen["error"] == expected, seen
    moe.recover()


def _ends(context: Context, done: int, launches: int, deadline: float) -> bool:
    """Rank 0's clock decides for all."""
    key = f"task/{context.task}/stop/{done}"
    if context.rank == 0:
        stop = done >= launches and time.monotonic() >= deadline
        context.store.set(key, str(int(stop)))
    context.meet()
    return context.store.get(key) == b"1"
