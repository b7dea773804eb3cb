"""Ten thousand launches back to back with different routing each time, eager and graph replays
mixed.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from tests.gpu.harness import (
    assert_at_rest,
    assert_correct,
    capture,
    forward,
    inputs_of,
    make_moe,
    poison,
)
from tests.routing import ROUTINGS

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LAUNCHES = int(os.environ.get("MEGAMOE_STRESS_LAUNCHES", "10000"))
CASES = 60
TOKENS = 48


@pytest.mark.parametrize("name", ["stress2", "stress8", "block_stress8"])
def test_many_launches(name):
    moe = make_moe(name)
    choose = random.Random(name)
    cases = []
    for seed in range(CASES):
        routing = ROUTINGS[seed % len(ROUTINGS)]
        inputs = inputs_of(moe, routing, seed=seed, tokens=TOKENS)
        outputs = forward(moe, *inputs)
        assert_correct(moe, outputs, *inputs)
        cases.append((inputs, outputs))

    full = [case for case in cases if all(x.shape[0] == TOKENS for x in case[0][0])]
    held = [[tensor.clone() for tensor in part] for part in full[0][0]]
    graph, graph_outputs = capture(moe, *held)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for launch in range(LAUNCHES):
        if launch % 97 == 0:
            poison(moe)
        if choose.random() < 0.5:
            inputs, expected = choose.choice(full)
            for part, new in zip(held, inputs, strict=True):
                torch._foreach_copy_(part, new)
            graph.replay()
            outputs = graph_outputs
        else:
            inputs, expected = choose.choice(cases)
            outputs = moe(*inputs)
        for out, want in zip(outputs, expected, strict=True):
            wrong += (out != want).any()
    moe.synchronize()
    assert wrong.item() == 0, f"{wrong.item()} outputs differ in {LAUNCHES} launches"
    assert_at_rest(moe)
