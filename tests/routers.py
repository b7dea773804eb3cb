"""Routers in tests: the kernel on a CPU, arguments, and what counts as the same routing."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from megamoe import compile, router_reference
from megamoe.machine.machine import Machine
from megamoe.router import arguments_of
from megamoe.router_config import RouterConfig, canonical

#: Of weights: a few roundings to float32, behind sums of up to 512.
RELATIVE = 1.5e-6
#: Exponentials below the normal range of float32 may be zero.
ABSOLUTE = 1e-37

V3 = RouterConfig(64, 8, "sigmoid", num_groups=8, topk_groups=4, correction_bias=True)
V4 = RouterConfig(96, 6, "sqrtsoftplus", correction_bias=True)
V4_HASHED = RouterConfig(64, 6, "sqrtsoftplus", hashed=True)
QWEN3 = RouterConfig(128, 16, "softmax")
#: Lanes without experts, and one with fewer than others; half words.
ODD = RouterConfig(39, 4, "softmax", renormalize=False, logits="bfloat16")
GPT_OSS = canonical(RouterConfig(32, 4, "softmax", "chosen"))
CONFIGS = {
    "v3": V3, "v4": V4, "v4_hashed": V4_HASHED, "qwen3": QWEN3, "odd": ODD, "gpt_oss": GPT_OSS,
}  # fmt: skip


@functools.cache
def kernel_of(config: RouterConfig) -> compile.CompiledKernel:
    """For a CPU; built ahead of time, from the cache, or built into it."""
    ahead = os.environ.get("MEGAMOE_KERNEL_DIR")
    kernel = compile.load_program(compile.router_program(config), ahead, cpu=True)
    kernel.to_device(0)
    return kernel


def enqueue(
    machine: Machine, config: RouterConfig, logits: Tensor, out: tuple, *, correction_bias=None,
    routed_scaling_factor=1.0, num_tokens=None, mask=None, tid2eid=None, input_ids=None,
) -> None:  # fmt: skip
    """A launch on the stream of a machine."""
    named = dict(
        logits=logits, topk_idx=out[0], topk_weights=out[1], correction_bias=correction_bias,
        mask=mask, tid2eid=tid2eid, input_ids=input_ids,
        num_tokens=num_tokens if isinstance(num_tokens, Tensor) else None,
    )  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None:
            machine.memory.add(name, tensor if tensor.is_contiguous() else tensor._base)
    arguments = arguments_of(
        logits, *out, correction_bias, routed_scaling_factor, num_tokens, mask, tid2eid, input_ids
    )
    kernel = kernel_of(config)
    assert kernel.launches is not None
    kernel.launches.on_launch = machine.launch
    kernel.launcher()(0, **arguments)
    kernel.launches.on_launch = None
    kernel.launches.check()


def empty(config: RouterConfig, tokens: int, dtype=torch.int64, device="cpu"):
    """(topk_idx, topk_weights) of values that no router gives."""
    shape = tokens, config.top_k
    idx = torch.full(shape, -7, dtype=dtype, device=device)
    return idx, torch.full(shape, 7e7, device=device)


def on_the_machine(
    config: RouterConfig, logits: Tensor, dtype=torch.int64, checks: bool = True, **given
):
    """What a launch writes: (topk_idx, topk_weights); with the race detector, for which a C
    compiler is needed.
    """
    machine, out = Machine(compile.cache_dir(), checks=checks), empty(config, len(logits), dtype)
    enqueue(machine, config, logits, out, **given)
    machine.run()
    return out


def arguments_for(config: RouterConfig, tokens: int, seed: int, device="cpu") -> dict:
    """Logits and what else the router needs, at random; `logits` is the first."""
    rng = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=rng, device=device)
    given = {"logits": 2 * draw(tokens, config.num_experts)}
    given["logits"] = given["logits"].to(getattr(torch, config.logits))
    if config.correction_bias:
        given["correction_bias"] = 0.2 * draw(config.num_experts)
    if config.hashed:
        scores = draw(50, config.num_experts)
        given["tid2eid"] = scores.topk(config.top_k).indices
        ids = torch.randint(0, 50, (tokens,), generator=rng, device=device)
        given["input_ids"] = ids
    return given


def assert_same_routing(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], relative: float = RELATIVE
) -> None:
    """The same experts in the same order, and weights up to rounding."""
    assert torch.equal(got[0].long(), expected[0])
    torch.testing.assert_close(
        got[1].double(), expected[1].double(), rtol=relative, atol=ABSOLUTE, equal_nan=True
    )


def exact(config: RouterConfig, logits: Tensor, **given) -> tuple[Tensor, Tensor]:
    """The definition in float64."""
    return router_reference.route(config, logits, compute=torch.float64, **given)
