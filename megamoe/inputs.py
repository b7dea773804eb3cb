"""The arguments of a forward: one item per rank, checked before anything is launched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from megamoe.config import MoEConfig
from megamoe.weights import ALIGNMENT, check_tensor

INDEX_DTYPES = (torch.int64, torch.int32)


def by_rank(name: str, value: object, single: bool) -> list:
    """An argument of a forward as a list with one item per rank."""
    if single:
        return [value]
    try:
        return list(value)
    except TypeError:
        raise ValueError(
            f"{name} must be a tensor, or a list of one for each rank, got {type(value).__name__}"
        ) from None


def check_inputs(
    config: MoEConfig,
    device: torch.device,
    ranks: Sequence[int],
    scale_buffer: Callable[[int], torch.Tensor],
    xs: list,
    ids: list,
    weights: list,
    scales: list,
    outs: list,
    counts: list,
) -> None:
    """Raise ValueError, naming the argument, unless the lists hold what a forward takes, an item
    for each of the `ranks` of this process. `scale_buffer`: that of a rank in symmetric memory.
    """
    named = {
        "x": xs, "topk_idx": ids, "topk_weights": weights,
        "x_scale": scales, "out": outs, "expert_counts": counts,
    }  # fmt: skip
    for name, items in named.items():
        if len(items) != len(ranks):
            raise ValueError(
                f"{name} holds {len(items)} tensors, expected one for each of {len(ranks)} ranks"
            )
    output = getattr(torch, config.recipe.output)
    columns = zip(xs, ids, weights, scales, outs, counts, strict=True)
    for i, (x, idx, weight, scale, out, count) in enumerate(columns):
        where = f"[{i}]" if len(ranks) > 1 else ""
        if not isinstance(x, torch.Tensor) or x.dim() != 2:
            raise ValueError(f"x{where} must be a tensor of shape [T, {config.hidden_size}]")
        tokens = x.shape[0]
        if tokens > config.max_tokens_per_rank:
            raise ValueError(
                f"x{where} has T={tokens} tokens > max_tokens_per_rank={config.max_tokens_per_rank}"
            )
        rows, slots = (tokens, config.hidden_size), (tokens, config.top_k)
        token = torch.bfloat16
        if scale is not None or x.dtype == torch.float8_e4m3fn:
            token = _check_scale(config, device, x, scale, partial(scale_buffer, ranks[i]), where)
        check_tensor(f"x{where}", x, rows, token, device, ALIGNMENT)
        check_tensor(f"topk_weights{where}", weight, slots, torch.float32, device)
        wide = getattr(idx, "dtype", None) not in INDEX_DTYPES
        dtype = torch.int64 if wide else idx.dtype
        check_tensor(f"topk_idx{where}", idx, slots, dtype, device)
        if out is not None:
            check_tensor(f"out{where}", out, rows, output, device, ALIGNMENT)
            _check_written(f"out{where}", out)
            # Rows of y are written while peers, or this rank, still read others of x.
            if tokens and _overlap(x, out):
                raise ValueError(f"out{where} and x{where} overlap")
        if count is not None:
            local = (config.experts_per_rank,)
            check_tensor(f"expert_counts{where}", count, local, torch.int32, device)
            _check_written(f"expert_counts{where}", count)
    if len(ranks) > 1:
        _check_apart(outs)


def _check_scale(
    config: MoEConfig,
    device: torch.device,
    x: torch.Tensor,
    scale: object,
    scale_buffer: Callable[[], torch.Tensor],
    where: str,
) -> torch.dtype:
    """Check the scales of a quantised x; the dtype that x must have."""
    precision = config.precision
    if not config.recipe.scaled:
        if scale is None:
            return torch.bfloat16
        raise ValueError(f"x_scale{where} is given, but precision={precision!r} has no scales")
    shape = (x.shape[0], config.token_scales)
    if scale is None:
        raise ValueError(
            f"x_scale{where} is missing: x of {x.dtype} needs float32 {list(shape)} with "
            f"precision={precision!r}"
        )
    buffer = scale_buffer()[: x.shape[0]]
    there = isinstance(scale, torch.Tensor) and scale.data_ptr() == buffer.data_ptr()
    if not (there and scale.dtype == buffer.dtype and scale.numel()):
        check_tensor(f"x_scale{where}", scale, shape, torch.float32, device)
    elif scale.shape != shape or scale.stride() != buffer.stride():
        raise ValueError(
            f"x_scale{where} starts in the scale buffer, but has shape {list(scale.shape)} and "
            f"strides {list(scale.stride())}, expected {list(shape)} and "
            f"{list(buffer.stride())}"
        )
    return getattr(torch, config.recipe.token)


def _check_written(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError, naming the tensor, if autograd forbids to write it in place here."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but a forward records none")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor, used outside of torch.inference_mode")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two contiguous tensors share memory."""
    begin, other = a.data_ptr(), b.data_ptr()
    return begin < other + b.nbytes and other < begin + a.nbytes


def _check_apart(outs: list[torch.Tensor | None]) -> None:
    """Raise ValueError if outputs of two ranks share memory."""
    filled = [(i, out) for i, out in enumerate(outs) if out is not None and out.numel()]
    spans = sorted((out.data_ptr(), out.nbytes, i) for i, out in filled)
    for (begin, num_bytes, i), (following, _, j) in itertools.pairwise(spans):
        if following < begin + num_bytes:
            raise ValueError(f"out[{min(i, j)}] and out[{max(i, j)}] overlap")
