"""The arguments of a forward: one item per rank, checked before anything is launched."""

from __future__ import annotations

import bisect
import itertools

import torch

from megamoe.config import MoEConfig
from megamoe.weights import ALIGNMENT, check_tensor
from workspace.views import Workspace

INDEX_DTYPES = (torch.int64, torch.int32)


#: Arguments of a forward, in order; those after the third may be None.
NAMES = ("x", "topk_idx", "topk_weights", "x_scale", "out", "expert_counts")
REQUIRED = 3


def columns_of(single: bool, *arguments: object) -> list[list]:
    """The arguments of a forward as lists with one item per rank; `single`: they are plain."""
    if single:
        return [[argument] for argument in arguments]
    columns = []
    for position, (name, argument) in enumerate(zip(NAMES, arguments, strict=True)):
        if argument is None and position >= REQUIRED:
            argument = [None] * len(columns[0])
        try:
            columns.append(list(argument))
        except TypeError:
            kind = type(argument).__name__
            raise ValueError(
                f"{name} must be a tensor, or a list of one for each rank, got {kind}"
            ) from None
    return columns


def check_inputs(
    config: MoEConfig, device: torch.device, workspace: Workspace, *columns: list
) -> None:
    """Raise ValueError, naming the argument, unless the columns (see `columns_of`) hold what a
    forward takes, an item for each rank of this process.
    """
    ranks = workspace.local_ranks
    for name, items in zip(NAMES, columns, strict=True):
        if len(items) != len(ranks):
            raise ValueError(
                f"{name} holds {len(items)} tensors, expected one for each of {len(ranks)} ranks"
            )
    output = getattr(torch, config.recipe.output)
    read, written = [], []
    for i, (x, idx, weight, scale, out, count) in enumerate(zip(*columns, strict=True)):
        where = f"[{i}]" if len(ranks) > 1 else ""
        if not isinstance(x, torch.Tensor) or x.dim() != 2:
            raise ValueError(f"x{where} must be a tensor of shape [T, {config.hidden_size}]")
        tokens = x.shape[0]
        if tokens > config.max_tokens_per_rank:
            raise ValueError(
                f"x{where} has T={tokens} tokens > max_tokens_per_rank={config.max_tokens_per_rank}"
            )
        rows, slots = (tokens, config.hidden_size), (tokens, config.top_k)
        token, buffers = torch.bfloat16, workspace.regions(ranks[i])
        if scale is not None or x.dtype == torch.float8_e4m3fn:
            token = _check_scale(config, device, x, scale, buffers, where)
            read.append((f"x_scale{where}", scale))
        check_tensor(f"x{where}", x, rows, token, device, ALIGNMENT)
        check_tensor(f"topk_weights{where}", weight, slots, torch.float32, device)
        wide = getattr(idx, "dtype", None) not in INDEX_DTYPES
        dtype = torch.int64 if wide else idx.dtype
        check_tensor(f"topk_idx{where}", idx, slots, dtype, device)
        read += (f"x{where}", x), (f"topk_weights{where}", weight), (f"topk_idx{where}", idx)
        if out is None:
            written.append((f"the output{where}", buffers["layer_output"][:tokens]))
        else:
            check_tensor(f"out{where}", out, rows, output, device, ALIGNMENT)
            _check_writable(f"out{where}", out)
            written.append((f"out{where}", out))
        if count is not None:
            local = (config.experts_per_rank,)
            check_tensor(f"expert_counts{where}", count, local, torch.int32, device)
            _check_writable(f"expert_counts{where}", count)
            written.append((f"expert_counts{where}", count))
    _check_apart(read, written)


def _check_scale(
    config: MoEConfig,
    device: torch.device,
    x: torch.Tensor,
    scale: object,
    buffers: dict[str, torch.Tensor],
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
    buffer = buffers["input_sf_buffer"][: x.shape[0], : config.token_scales]
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


def _check_writable(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError, naming the tensor, if autograd forbids to write it in place here."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but a forward records none")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor, used outside of torch.inference_mode")


def _check_apart(read: list[tuple], written: list[tuple]) -> None:
    """Raise ValueError if what a forward writes shares memory with what it reads, on any rank, or
    with something else that it writes: rows are written while ranks still read others. Items are
    (name, tensor).
    """
    spans = sorted(_span(*item) for item in written if item[1].numel())
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{min(name, other)} and {max(name, other)} overlap")
    for name, tensor in read:
        begin, end, _ = _span(name, tensor)
        at = bisect.bisect(spans, (begin,))
        near = spans[max(at - 1, 0) : at + 1]
        for first, last, other in near:
            if begin < last and first < end:
                hint = ": pass out=, or a copy" if other.startswith("the output") else ""
                raise ValueError(f"{other} and {name} overlap{hint}")


def _span(name: str, tensor: torch.Tensor) -> tuple[int, int, str]:
    """(begin, end, name) of the memory of a tensor."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.nbytes, name
