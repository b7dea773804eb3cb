"""The router of an engine: `route` checks its arguments and launches the kernel, or, for tensors on
a CPU, computes what `router_reference` defines.

Kernels are loaded once per configuration and device. A launch goes to the current stream, allocates
nothing but outputs that are not given, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from megamoe import compile, router_reference
from megamoe.arguments import arch_of
from megamoe.custom_op import is_traced
from megamoe.router_config import (
    LOGITS,
    OVER_ALL,
    SOFTMAX,
    RouterConfig,
    canonical,
)

INTEGERS = (torch.int32, torch.int64)
#: A launcher is one for all threads, and packs its arguments in place.
_LAUNCHING = threading.Lock()


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = SOFTMAX,
    softmax_over: str = OVER_ALL,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    num_tokens: int | Tensor | None = None,
    mask: Tensor | None = None,
    tid2eid: Tensor | None = None,
    input_ids: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    idx_dtype: torch.dtype = torch.int64,
    kernel_dir: Path | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The K experts of every token and their weights, as `MegaMoE` takes them:
    (topk_idx [T, K], topk_weights float32 [T, K]), best expert first.

    logits: float32 or bfloat16 [T, E], rows in place; E up to 512, K up to 16.

    score: what a logit becomes, in float32. "softmax"; "sigmoid" (DeepSeek-V3, arXiv 2412.19437,
    section 2.1.2); "sqrtsoftplus", sqrt(log(1 + exp(x))) (DeepSeek-V4).
    softmax_over: "all" experts (Qwen3), or the "chosen" ones, softmax after top-k (gpt-oss).
    correction_bias: float32 [E], added to scores for choosing, not to weights (arXiv 2408.15664).
    num_groups, topk_groups: only experts of topk_groups groups can be chosen, of num_groups groups
    of neighbouring experts, a power of two up to 32: those whose two best scores, with bias, have
    the highest sums.
    renormalize: weights of a token are divided by their sum + 1e-20. routed_scaling_factor: what
    they are multiplied by then.

    num_tokens: rows from there on are padding: an integer, or int32 [1] on the device, which a
    captured graph reads anew. mask: bool [T], False for padding. Padding has index -1 and weight 0,
    and so has a slot that the table below gives no expert.
    tid2eid, input_ids: int32 or int64 [V, K] and [T]: the experts are those that the table has for
    a token id, in its order, and logits only weigh them (the first layers of DeepSeek-V4). An id
    outside 0..V-1 and an entry outside 0..E-1 name no expert.

    out: (topk_idx, topk_weights) to write, else they are allocated, topk_idx of `idx_dtype`, int64
    or int32. kernel_dir: of kernels built ahead of time.

    Of equal experts, and of equal groups, the lowest index comes first. Without bias and groups
    experts are compared by logit, else by score plus bias in float32, so that two that round to
    the same are equal. No expert is named twice, whatever a row holds: NaN counts as the largest
    value, as in `torch.topk`, and the weight of such an expert is NaN, with softmax or renormalize
    of every expert of its token. A logit of -inf has score 0, so it comes last unless a bias lifts
    it; where a token has no other, softmax weights are NaN, and sigmoid and sqrtsoftplus weights 0.

    Raises ValueError before anything is launched if an argument is not legal, RuntimeError while a
    graph is captured with a kernel that has not run yet, KernelError if none can be had.
    """
    directory = None if kernel_dir is None else os.fspath(kernel_dir)
    if is_traced():
        on_device = isinstance(num_tokens, Tensor)
        idx, weights = out or _allocated(logits, top_k, idx_dtype)
        torch.ops.megamoe.route(
            logits, correction_bias, num_tokens if on_device else None, mask, tid2eid, input_ids,
            idx, weights, score, softmax_over, num_groups, topk_groups, renormalize,
            routed_scaling_factor, None if on_device else num_tokens, directory,
        )  # fmt: skip
        return idx, weights
    config = canonical(
        RouterConfig(
            num_experts=_experts_of(logits),
            top_k=top_k,
            score=score,
            softmax_over=softmax_over,
            num_groups=num_groups,
            topk_groups=topk_groups,
            renormalize=renormalize,
            correction_bias=correction_bias is not None,
            hashed=tid2eid is not None,
            logits=_name(logits.dtype),
        )
    )
    tokens, device = logits.shape[0], logits.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits are on {device}; use 'cuda' or 'cpu'")
    if isinstance(routed_scaling_factor, bool) or not isinstance(
        routed_scaling_factor, (int, float)
    ):
        raise ValueError(f"routed_scaling_factor={routed_scaling_factor!r} must be a number")
    if (tid2eid is None) != (input_ids is None):
        raise ValueError("tid2eid and input_ids go together: one of them is missing")
    _check_row_alignment(config, logits)
    if correction_bias is not None:
        _check("correction_bias", correction_bias, (config.num_experts,), device, (torch.float32,))
        _check_aligned("correction_bias", correction_bias, config.load_bytes(4))
    if tid2eid is not None and input_ids is not None:
        vocabulary = tid2eid.shape[0] if isinstance(tid2eid, Tensor) and tid2eid.ndim else 0
        _check("tid2eid", tid2eid, (vocabulary, top_k), device, INTEGERS)
        _check("input_ids", input_ids, (tokens,), device, INTEGERS)
        if vocabulary < 1:
            raise ValueError("tid2eid has no row")
    if mask is not None:
        _check("mask", mask, (tokens,), device, (torch.bool,))
    _check_num_tokens(num_tokens, tokens, device)
    idx, weights = _outputs(out, logits, top_k, idx_dtype)
    if device.type == "cpu":
        found = router_reference.route(
            config, logits.detach(), correction_bias=correction_bias, mask=mask,
            routed_scaling_factor=routed_scaling_factor, num_tokens=num_tokens, tid2eid=tid2eid,
            input_ids=input_ids,
        )  # fmt: skip
        with torch.no_grad():
            idx.copy_(found[0])
            weights.copy_(found[1])
        return idx, weights
    kernel = _kernel(config, device, directory)
    if tokens:
        arguments = arguments_of(
            logits, idx, weights, correction_bias, routed_scaling_factor, num_tokens, mask, tid2eid,
            input_ids,
        )  # fmt: skip
        with torch.cuda.device(device), _LAUNCHING:
            kernel(torch.cuda.current_stream().cuda_stream, **arguments)
    return idx, weights


def arguments_of(
    logits: Tensor, idx: Tensor, weights: Tensor, correction_bias: Tensor | None, factor: float,
    num_tokens: int | Tensor | None, mask: Tensor | None, tid2eid: Tensor | None,
    input_ids: Tensor | None,
) -> dict:  # fmt: skip
    """The arguments of a launch by name, without its stream (`RouterArguments`)."""
    tokens = logits.shape[0]
    valid, there = (tokens, num_tokens) if isinstance(num_tokens, Tensor) else (num_tokens, None)
    return dict(
        logits=logits.data_ptr(),
        correction_bias=_address(correction_bias),
        tid2eid=_address(tid2eid),
        input_ids=_address(input_ids),
        valid_tokens=_address(there),
        mask=_address(mask),
        topk_idx=idx.data_ptr(),
        topk_weights=weights.data_ptr(),
        row_bytes=logits.stride(0) * logits.element_size(),
        vocabulary=0 if tid2eid is None else tid2eid.shape[0],
        num_tokens=tokens,
        num_valid=tokens if valid is None else valid,
        wide_table=int(tid2eid is not None and tid2eid.dtype == torch.int64),
        wide_ids=int(input_ids is not None and input_ids.dtype == torch.int64),
        wide_idx=int(idx.dtype == torch.int64),
        scaling_factor=float(factor),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _kernel(config: RouterConfig, device: torch.device, kernel_dir: str | None) -> compile.Launcher:
    """What launches the kernel of a configuration on a device."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"route was not called yet with {config}: call it once before a graph is captured, so "
            "that its kernel is loaded"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    loaded = compile.load_program(
        compile.router_program(config, arch_of(torch.device("cuda", index))), kernel_dir
    )
    with torch.cuda.device(index):
        loaded.to_device(index)
    return loaded.launcher()


@torch.library.custom_op("megamoe::route", mutates_args=("topk_idx", "topk_weights"))
def _route(
    logits: Tensor,
    correction_bias: Tensor | None,
    valid_tokens: Tensor | None,
    mask: Tensor | None,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    topk_idx: Tensor,
    topk_weights: Tensor,
    score: str,
    softmax_over: str,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
    num_tokens: int | None,
    kernel_dir: str | None,
) -> None:
    """`route` as an operator, for those who trace what is called (`custom_op`)."""
    route(
        logits, topk_idx.shape[1], score=score, softmax_over=softmax_over,
        correction_bias=correction_bias, num_groups=num_groups, topk_groups=topk_groups,
        renormalize=renormalize, routed_scaling_factor=routed_scaling_factor,
        num_tokens=num_tokens if valid_tokens is None else valid_tokens, mask=mask,
        tid2eid=tid2eid, input_ids=input_ids, out=(topk_idx, topk_weights), kernel_dir=kernel_dir,
    )  # fmt: skip


@_route.register_fake
def _(
    logits, correction_bias, valid_tokens, mask, tid2eid, input_ids, topk_idx, topk_weights, score,
    softmax_over, num_groups, topk_groups, renormalize, routed_scaling_factor, num_tokens,
    kernel_dir,
):  # fmt: skip
    return None


# --- Checks ---------------------------------------------------------------------------------------


def _experts_of(logits: object) -> int:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must be a tensor [T, E], got {shape}")
    return logits.shape[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(name: str, tensor: object, shape: tuple, device: torch.device, dtypes: tuple) -> None:
    """ValueError, naming the argument, unless it is such a tensor, in one piece."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        known = " or ".join(map(_name, dtypes))
        raise ValueError(f"{name} has dtype {_name(tensor.dtype)}, expected {known}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, logits are on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def _check_row_alignment(config: RouterConfig, logits: Tensor) -> None:
    if logits.numel() and logits.stride(1) != 1:
        raise ValueError(
            f"logits must have neighbouring columns, their strides are {logits.stride()}"
        )
    _check_aligned("logits", logits, config.load_bytes(LOGITS[config.logits]))


def _check_aligned(name: str, tensor: Tensor, num_bytes: int) -> None:
    """ValueError unless every row begins at a multiple of so many bytes, as lanes load them."""
    rows = tensor.ndim > 1 and len(tensor) > 1
    step = tensor.stride(0) * tensor.element_size() if rows else 0
    if tensor.numel() and (tensor.data_ptr() % num_bytes or step % num_bytes):
        raise ValueError(
            f"{name} must have rows that begin at multiples of {num_bytes} bytes: the first is at "
            f"{tensor.data_ptr():#x}, the next {step} bytes behind it"
        )


def _check_num_tokens(num_tokens: object, tokens: int, device: torch.device) -> None:
    if isinstance(num_tokens, Tensor):
        if num_tokens.numel() != 1:
            raise ValueError(f"num_tokens has shape {list(num_tokens.shape)}, expected [1]")
        _check("num_tokens", num_tokens.reshape(1), (1,), device, (torch.int32,))
    elif num_tokens is not None:
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int):
            raise ValueError(f"num_tokens={num_tokens!r} must be an integer or a tensor")
        if not 0 <= num_tokens <= tokens:
            raise ValueError(f"num_tokens={num_tokens} must be in 0..{tokens}, the rows of logits")


def _allocated(logits: Tensor, top_k: int, idx_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if idx_dtype not in INTEGERS:
        raise ValueError(f"idx_dtype={idx_dtype} must be torch.int64 or torch.int32")
    shape = logits.shape[0], top_k
    idx = torch.empty(shape, dtype=idx_dtype, device=logits.device)
    return idx, torch.empty(shape, dtype=torch.float32, device=logits.device)


def _outputs(
    out: object, logits: Tensor, top_k: int, idx_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape, device = (logits.shape[0], top_k), logits.device
    if out is None:
        return _allocated(logits, top_k, idx_dtype)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise ValueError("out must be a pair (topk_idx, topk_weights)")
    idx, weights = out
    _check("out[0], topk_idx,", idx, shape, device, INTEGERS)
    _check("out[1], topk_weights,", weights, shape, device, (torch.float32,))
    return idx, weights
