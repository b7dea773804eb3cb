"""What the hardware allows: the work of one routing, and the least time that it can take.

Work is counted from the real `topk_idx`, per GPU, masked slots left out; ranks that share a GPU add
up there.
- math: 6 * routed tokens * H * I, the multiply-adds of FC1 (2I columns) and FC2; a shared expert
  has every token of a rank.
- hbm: the weights of the touched experts with their scales once, of shared ones those of every rank
  with tokens, each token's input (bf16) and routing once and its output once. Rows held between
  dispatch, FC1, FC2 and combine can stay in the cache and are left out.
- nvlink: for every routed token whose expert lives on another GPU one row (with its scales) there
  and one back. Ranks on one GPU send nothing, and rows of shared experts do not travel. A link
  carries both directions at once, so the larger of received and sent counts.

The bound is the slowest of the three on the busiest GPU: a lower bound, as if they overlapped
fully.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from megamoe.precision import ITEM_BYTES
from megamoe.weights import weight_shapes
from perf.workload.cases import Case


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reaches at its best: TFLOP/s of a GEMM by the dtype of its operands, TB/s of its
    memory, GB/s over NVLink in one direction.
    """

    gemm_tflops: dict[str, float]
    hbm_tbps: float
    nvlink_gbps: float

    def gemm(self, dtype: str) -> float:
        """TFLOP/s for tokens of this dtype; ValueError if nobody measured it."""
        if dtype not in self.gemm_tflops:
            known = ", ".join(self.gemm_tflops)
            raise ValueError(f"there is no GEMM ceiling for {dtype}, only for {known}")
        return self.gemm_tflops[dtype]


#: Measured on H200 SXM, torch 2.11 + CUDA 13.0: cuBLAS BF16 GEMM on random data, and the best FP8
#: GEMM; HBM copy, read plus write; peer pull by SM loads, all ranks at once, per GPU and direction.
H200 = Ceilings({"bfloat16": 780.0, "float8_e4m3fn": 1490.0}, hbm_tbps=4.3, nvlink_gbps=330.0)
#: H100 SXM has the SMs and links of an H200. Its memory, of 3.35 TB/s: not measured, but the part
#: that an H200 reaches of its 4.8.
H100 = replace(H200, hbm_tbps=3.0)
#: By the device's name.
CEILINGS = {"NVIDIA H200": H200, "NVIDIA H100 80GB HBM3": H100}

ROUTE_BYTES = ITEM_BYTES["int32"] + ITEM_BYTES["float32"]  # expert id and router weight of a slot

MATH, HBM, NVLINK = "math", "hbm", "nvlink"


@dataclass(frozen=True)
class Work:
    """Per GPU: useful FLOPs, HBM bytes, and NVLink bytes in the busier direction."""

    flops: tuple[int, ...]
    hbm_bytes: tuple[int, ...]
    nvlink_bytes: tuple[int, ...]

    @property
    def flops_per_gpu(self) -> float:
        """Useful FLOPs of an average GPU."""
        return sum(self.flops) / len(self.flops)

    def tflops(self, us: float) -> float:
        """Useful TFLOP/s per GPU when the layer takes `us` microseconds."""
        return self.flops_per_gpu / us / 1e6


@dataclass(frozen=True)
class Roofline:
    """The lower bound in microseconds, and what sets it."""

    us: float
    bound: str

    def share(self, us: float) -> float:
        """Part of the bound that a time of `us` reaches: 1 is the roofline."""
        return self.us / us


def counts_of(case: Case, topk_idx: torch.Tensor) -> torch.Tensor:
    """int64 [E] on the CPU: routed tokens from one rank to every expert."""
    live = topk_idx[topk_idx >= 0].flatten().long().cpu()
    return torch.bincount(live, minlength=case.model.num_experts)


def routed_counts(case: Case, topk_idx: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 [W, E] on the CPU: routed tokens from every rank to every expert."""
    assert len(topk_idx) == case.num_ranks, (len(topk_idx), case.num_ranks)
    return torch.stack([counts_of(case, idx) for idx in topk_idx])


def work_of(case: Case, topk_idx: Sequence[torch.Tensor]) -> Work:
    """The work of this routing. Rank r lives on GPU r modulo the number of GPUs."""
    tokens_W = [idx.shape[0] for idx in topk_idx]
    return work_of_counts(case, routed_counts(case, topk_idx), tokens_W)


def work_of_counts(case: Case, counts_WE: torch.Tensor, tokens_W: Sequence[int]) -> Work:
    """The same from the routed tokens [W, E] and the tokens of every rank."""
    model, recipe = case.model, case.config(case.tokens).recipe
    gpu_of_rank = torch.arange(case.num_ranks) % case.num_gpus
    gpu_of_expert = gpu_of_rank.repeat_interleave(case.experts_per_rank)

    # Rows from the GPU of the tokens to the GPU of the experts.
    gpus = range(case.num_gpus)
    rows_GG = torch.zeros(case.num_gpus, case.num_gpus, dtype=torch.int64)
    touched_G = torch.zeros(case.num_gpus, dtype=torch.int64)
    for gpu in gpus:
        owned_WE = counts_WE[:, gpu_of_expert == gpu]
        rows_GG[:, gpu].index_add_(0, gpu_of_rank, owned_WE.sum(dim=1))
        touched_G[gpu] = (owned_WE.sum(dim=0) > 0).sum()
    tokens_G = [sum(tokens_W[gpu :: case.num_gpus]) for gpu in gpus]
    computed_G, shared = rows_GG.sum(dim=0), model.num_shared_experts
    for rank, tokens in enumerate(tokens_W):
        computed_G[gpu_of_rank[rank]] += shared * tokens
        touched_G[gpu_of_rank[rank]] += shared * (tokens > 0)

    shapes = weight_shapes(recipe, 1, model.hidden, model.intermediate).values()
    expert_bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in shapes)
    token_bytes = 2 * model.hidden * recipe.output_bytes + model.top_k * ROUTE_BYTES
    there = recipe.tokens.num_bytes(model.hidden)
    there += ITEM_BYTES["float32"] * recipe.tokens.num_scales(model.hidden)
    back = model.hidden * recipe.output_bytes
    away_GG = rows_GG - torch.diag(rows_GG.diagonal())
    into, out_of = away_GG.sum(dim=0), away_GG.sum(dim=1)
    received = into * there + out_of * back
    sent = out_of * there + into * back
    return Work(
        flops=tuple((6 * model.hidden * model.intermediate * computed_G).tolist()),
        hbm_bytes=tuple(
            int(touched_G[gpu]) * expert_bytes + tokens_G[gpu] * token_bytes for gpu in gpus
        ),
        nvlink_bytes=tuple(torch.maximum(received, sent).tolist()),
    )


def roofline_of(work: Work, ceilings: Ceilings, dtype: str = "bfloat16") -> Roofline:
    """The bound of `work` on tokens of `dtype`."""
    us = {
        MATH: max(work.flops) / (ceilings.gemm(dtype) * 1e6),
        HBM: max(work.hbm_bytes) / (ceilings.hbm_tbps * 1e6),
        NVLINK: max(work.nvlink_bytes) / (ceilings.nvlink_gbps * 1e3),
    }
    bound = max(us, key=us.__getitem__)
    return Roofline(us[bound], bound)
