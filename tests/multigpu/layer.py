"""What the jobs share: a module per configuration on this GPU, inputs, forwards, poison."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megamoe import MegaMoE
from megamoe.reference import Weights
from tests.gpu import harness
from tests.multigpu.configs import CONFIGS
from tests.multigpu.launcher import Context

TIMEOUT_S = 10.0
FAULT_TIMEOUT_S = 1.0

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def construct(context: Context, name: str, timeout_s: float = TIMEOUT_S, **changes) -> MegaMoE:
    """A fresh module without weights; collective. `changes` replace its arguments."""
    fields = dict(CONFIGS[name])
    kernel = fields.pop("kernel")
    assert fields.pop("num_ranks") == context.world, f"{name} is not for {context.world} ranks"
    arguments = {
        "group": dist.group.WORLD,
        "device": context.device,
        "timeout_s": timeout_s,
        "start_timeout_s": timeout_s,
        "kernel_dir": os.environ.get("MEGAMOE_KERNEL_DIR"),
        "kernel_options": kernel,
        **fields,
    }
    return MegaMoE(**{**arguments, **changes})


def load_slice(moe: MegaMoE, rank: int, weights: Weights) -> None:
    """The experts of one rank out of all of them."""
    local = moe.config.local_experts
    moe.load_weights(*weights.of(slice(rank * local, (rank + 1) * local)))


def make(context: Context, name: str, timeout_s: float = TIMEOUT_S, **changes) -> MegaMoE:
    """A fresh module with its weights; collective."""
    moe = construct(context, name, timeout_s, **changes)
    moe.load_weights(*harness.weights_here(moe))
    return moe


def shared(context: Context, name: str, timeout_s: float = TIMEOUT_S) -> MegaMoE:
    """The same module for all tasks: state that leaks between launches shows."""
    key = (name, timeout_s)
    if key not in context.cache:
        context.cache[key] = make(context, name, timeout_s)
    return context.cache[key]


def inputs_of(context: Context, moe: MegaMoE, routing: str, seed: int, tokens=None) -> Inputs:
    """This rank's part of the inputs of a launch."""
    return tuple(part[context.rank] for part in harness.inputs_of(moe, routing, seed, tokens))


def forward(moe: MegaMoE, inputs: Inputs) -> torch.Tensor:
    """One forward, waited for, into a poisoned output; a copy of it."""
    moe.backend.outputs[0].fill_(float("nan"))
    out = moe(*inputs)
    moe.synchronize()
    return out.clone()


def poison_together(context: Context, moe: MegaMoE) -> None:
    """Poison the data regions of every rank, while no rank has a launch in flight."""
    torch.cuda.synchronize()
    context.meet()
    harness.poison(moe)
    torch.cuda.synchronize()
    context.meet()


def assert_correct(moe: MegaMoE, out: torch.Tensor, inputs: Inputs) -> None:
    harness.assert_correct(moe, [out], *[[part] for part in inputs])


def roll(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """A tensor of any dtype with its first axis rotated, by its bytes."""
    return tensor.view(torch.uint8).roll(by, 0).view(tensor.dtype)


def capture(moe: MegaMoE, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """(graph, output) of one forward. Other threads (NCCL's) may use CUDA meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = moe(*inputs)
    return graph, out


def refill(held: Inputs, fresh: Inputs) -> None:
    """Other contents for captured buffers."""
    for buffer, new in zip(held, fresh, strict=True):
        buffer.copy_(new)


def attempt(call: Callable) -> dict:
    """What a call that may fail did: `error` (name of the type, or None), `message`, `seconds`."""
    started = time.monotonic()
    error, message = None, ""
    try:
        call()
    except Exception as caught:
        error, message = type(caught).__name__, str(caught)
    return {"error": error, "message": message, "seconds": time.monotonic() - started}
