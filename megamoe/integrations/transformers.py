"""transformers: models run their experts by MegaMoE with `experts_implementation="megamoe"`.

Importing this module registers the name. What the layer does for a module of the model, and what it
refuses, is in `megamoe.integrations.experts`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from megamoe.integrations import experts
from megamoe.module import MegaMoE

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError(
        "megamoe.integrations.transformers needs transformers 5.17 or newer, with its experts "
        "interface: pip install 'megamoe[transformers]'"
    ) from error

NAME = "megamoe"


def configure(
    name: str = NAME,
    *,
    precision: str = "bf16",
    max_tokens: int = 4096,
    group: torch.distributed.ProcessGroup | None = None,
    kernel_dir: Path | str | None = None,
    num_sms: int | None = None,
    timeout_s: float = 30.0,
    start_timeout_s: float = 300.0,
    kernel_options: dict | None = None,
    free_weights: bool = False,
) -> None:
    """Say how `experts_implementation=name` runs; a name that is new is registered with it.

    Every call replaces all options of the name. Models that run under it already make their layers
    anew on their next call. Models that differ take different names.

    name: "megamoe", or another that transformers does not have.
    precision: "bf16", which reads the model's weights where they are; with others of `MegaMoE`
        ("fp8_block", "fp8_mxfp4", ...) the bfloat16 weights are quantised once
        (`megamoe.quantize_weights`), on the first call and again when they have changed.
    max_tokens: tokens of a launch, for which the workspace has room and the kernel is compiled. A
        call with more is split into as few launches as need be; with a group it is refused.
    group: a torch.distributed process group with one process per GPU of this node. Every rank calls
        the model at the same time, each with its own tokens (a call with none still counts), and
        has all experts' weights in its model; it computes with its share of them, experts
        rank * E / W and following, for the tokens of all ranks. It is for inputs that differ by
        rank; a plan of transformers that splits experts itself excludes it.
    kernel_dir, num_sms, timeout_s, start_timeout_s, kernel_options: as of `MegaMoE`.
    free_weights: once a layer has its copy, of a precision other than "bf16" or of its share with a
        group, the module's own weights are freed: they become empty, so the model can be neither
        saved nor run by another implementation.

    Raises ValueError for an unknown precision, a max_tokens that is no integer >= 1, free_weights
    without a copy, and a name that transformers has itself. What a model has that the layer cannot
    compute is a ValueError of the model's first call.
    """
    if name == "eager" or (name in ALL_EXPERTS_FUNCTIONS and name not in experts.OPTIONS):
        raise ValueError(f"name={name!r} is an implementation of transformers: take another name")
    experts.OPTIONS[name] = experts.Options(
        precision=precision,
        max_tokens=max_tokens,
        group=group,
        kernel_dir=kernel_dir,
        num_sms=num_sms,
        timeout_s=timeout_s,
        start_timeout_s=start_timeout_s,
        kernel_options=kernel_options,
        free_weights=free_weights,
    )
    ALL_EXPERTS_FUNCTIONS[name] = functools.partial(_forward, name)


def _forward(
    name: str,
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers calls in place of an experts module's own forward."""
    return experts.forward(name, self, hidden_states, top_k_index, top_k_weights)


def layers_of(model: torch.nn.Module) -> list[MegaMoE]:
    """The layers that a model's calls have made so far, in the order of its modules: to
    `synchronize`, which raises what launches reported, or to `meet` before a first launch.
    """
    found = map(experts.fused_of, model.modules())
    return [fused.moe for fused in found if fused is not None and fused.moe is not None]


def release(model: torch.nn.Module) -> None:
    """Give back what a model's layers hold; its next call makes them anew, from the weights that it
    has then. For weights that were quantised and then written in a way that torch does not count
    (`parameter.data.copy_`). Raises ValueError after `free_weights`.
    """
    for fused in map(experts.fused_of, model.modules()):
        if fused is not None:
            fused.close()


if NAME not in experts.OPTIONS:
    configure()
