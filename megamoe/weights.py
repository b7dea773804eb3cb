"""Checkpoint layout -> kernel layout of the expert weights.

Checkpoints hold `w13` as [e, 2I, H] (gate rows, then up rows) and `w2` as [e, H, I]. The kernel
wants gate and up rows
interleaved by 8, so that a thread that holds a gate column of an FC1 accumulator also holds its up
column: row 16 * i + r is gate row 8 * i + r for r < 8, and up row 8 * i + r - 8 above. `w2` is used
as it is.
"""

from __future__ import annotations

import torch

from megamoe.config import MoEConfig

INTERLEAVE = 8  # columns of one slab of a WGMMA accumulator


def interleave_gate_up(w13_e2IH: torch.Tensor) -> torch.Tensor:
    """[e, 2I, H] gate then up -> [e, 2I, H] interleaved by 8 (a new tensor)."""
    experts, rows, hidden = w13_e2IH.shape
    halves = w13_e2IH.view(experts, 2, rows // (2 * INTERLEAVE), INTERLEAVE, hidden)
    return halves.transpose(1, 2).reshape(experts, rows, hidden)


def check_weights(
    config: MoEConfig,
    num_local_experts: int,
    device: torch.device,
    w13: torch.Tensor,
    w2: torch.Tensor,
):
    """Raise ValueError, naming the tensor, unless both have the checkpoint layout, dtype and
    device.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    expected = {
        "w13": (w13, (num_local_experts, 2 * intermediate, hidden)),
        "w2": (w2, (num_local_experts, hidden, intermediate)),
    }
    for name, (tensor, shape) in expected.items():
        check_tensor(name, tensor, shape, getattr(torch, config.recipe.weight), device)


def fits(tensor: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """True if `tensor` passes `check_tensor`, in about a microsecond: every forward asks."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.device == device
        and tensor.is_contiguous()
    )


def check_tensor(
    name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError, naming field and value, unless `tensor` has this shape, dtype and device
    and is contiguous.
    """
    if fits(tensor, shape, dtype, device):
        return
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device.type != device.type or (
        device.index is not None and tensor.device.index != device.index
    ):
        raise ValueError(f"{name} is on device {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} with strides {list(tensor.stride())} is not contiguous")
