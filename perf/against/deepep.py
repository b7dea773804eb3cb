"""The layer made of DeepEP (normal mode, one machine) and DeepGEMM: what it is compared with where
both are installed. FP8 with a scale per 128 columns and per 128 x 128 weights, a process per GPU.

DeepEP sends a token once to every rank that needs it and adds the ranks' results in float32;
DeepGEMM multiplies rows sorted by expert, every expert's padded to 128. Between them are torch
operations. Letters: N received tokens, K top-k, R = N * K slots, M padded rows, H hidden, e experts
of this rank.
"""

from __future__ import annotations

import importlib

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamoe.precision import FP8_BLOCK
from megamoe.reference import quantize, take_rows
from perf.against.experts import MAX_FP8_ERROR, hidden_rows

NAME = "deepep_deepgemm"
MODULES = ("deep_ep", "deep_gemm")
PRECISION = "fp8_block"
#: Rows of an expert are padded to a multiple of this, which a DeepGEMM tile never straddles.
ALIGNMENT = 128


def check_available(precision: str, processes: bool, verify: bool) -> None:
    """ValueError, in a line, unless this baseline can be measured here. Nobody may time it without
    comparing its output.
    """
    if precision != PRECISION:
        raise ValueError(f"--baseline {NAME} needs --precision {PRECISION}, not {precision}")
    if not processes:
        raise ValueError(f"--baseline {NAME} needs a process per GPU: start it with torchrun")
    if not verify:
        raise ValueError(f"--baseline {NAME} is measured only with --verify")
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # extension modules fail to load in many ways
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"--baseline {NAME} needs the module {name}: {reason}") from None


class DeepEpDeepGemm:
    """The layer of one rank over the quantised weights of its own experts, which are not copied;
    collective over the default process group. Attributes as other `baselines`.

    scales: of w13 and w2, as in `megamoe.reference.Weights`. clamp: of SwiGLU. Masks cost nothing
    extra here: in received tokens the slots of other ranks are masked anyway.
    """

    capturable = False
    quantised = True
    max_error = MAX_FP8_ERROR
    config = f"form=blocked scales=1x{FP8_BLOCK} between=torch"

    def __init__(
        self,
        w13_e2IH: torch.Tensor,
        w2_eHI: torch.Tensor,
        num_ranks: int,
        masked: bool = True,
        scales: tuple[torch.Tensor, ...] = (),
        clamp: float | None = None,
    ):
        deep_ep, self.deep_gemm = map(importlib.import_module, MODULES)
        self.w13, self.w2 = (w13_e2IH, scales[0]), (w2_eHI, scales[1])
        self.clamp, self.local = clamp, w13_e2IH.shape[0]
        self.num_experts = num_ranks * self.local
        self.experts = torch.arange(self.local, device=w13_e2IH.device)
        self.id_dtype = getattr(deep_ep, "topk_idx_t", torch.int64)
        configs = (
            deep_ep.Buffer.get_dispatch_config(num_ranks),
            deep_ep.Buffer.get_combine_config(num_ranks),
        )
        row_bytes = 2 * w2_eHI.shape[1]
        num_bytes = max(c.get_nvl_buffer_size_hint(row_bytes, num_ranks) for c in configs)
        self.buffer = deep_ep.Buffer(dist.group.WORLD, num_bytes, 0)

    def __call__(
        self, x_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] bf16: a new tensor."""
        ids_TK = topk_idx_TK.to(self.id_dtype)
        to_rank, _, to_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(
            ids_TK, self.num_experts
        )
        rows, ids_NK, weights_NK, counts, handle, _ = self.buffer.dispatch(
            quantize(x_TH, FP8_BLOCK),
            topk_idx=ids_TK,
            topk_weights=topk_weights_TK,
            num_tokens_per_rank=to_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=to_expert,
            expert_alignment=ALIGNMENT,
        )  # the host waits for the counts
        sums_NH = self._experts(rows, ids_NK, weights_NK, sum(counts), x_TH)
        return self.buffer.combine(sums_NH, handle)[0]

    def _experts(
        self,
        rows: tuple[torch.Tensor, torch.Tensor],
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        num_rows: int,
        like_TH: torch.Tensor,
    ) -> torch.Tensor:
        """[N, H] bf16: the sum of a token's results by the experts of this rank; ids are theirs, or
        -1. num_rows: M, of all experts with their padding.
        """
        if num_rows == 0:
            return like_TH.new_zeros(ids_NK.shape[0], like_TH.shape[1])
        ids_R = ids_NK.flatten().long()
        ids_R = ids_R.masked_fill(ids_R < 0, self.local)  # sort behind the last expert
        sorted_R, slot_R = torch.sort(ids_R)
        row_R = self._rows(sorted_R, num_rows)

        def place(empty: float, values_R: torch.Tensor) -> torch.Tensor:
            """[M]: the values of the rows' slots; `empty` on padding."""
            placed = values_R.new_full((num_rows + 1,), empty)
            return placed.scatter_(0, row_R, values_R)[:num_rows]

        expert_M = place(-1, sorted_R.to(torch.int32))
        token_M = place(0, slot_R // ids_NK.shape[1])
        weights_M = place(0, weights_NK.flatten().index_select(0, slot_R))

        gate_up_M2I = like_TH.new_empty(num_rows, self.w13[0].shape[1])
        multiply = self.deep_gemm.m_grouped_fp8_gemm_nt_contiguous
        multiply(take_rows(rows, token_M), self.w13, gate_up_M2I, expert_M)
        hidden = quantize(hidden_rows(gate_up_M2I, weights_M, self.clamp), FP8_BLOCK)
        out_MH = like_TH.new_empty(num_rows + 1, like_TH.shape[1])  # the last is of masked slots
        multiply(hidden, self.w2, out_MH[:num_rows], expert_M)

        row_of_slot_R = torch.empty_like(row_R).scatter_(0, slot_R, row_R)
        # Adds rows in float32 and rounds once; reads none of masked slots.
        return F.embedding_bag(
            row_of_slot_R.view_as(ids_NK), out_MH, mode="sum", padding_idx=num_rows
        )

    def _rows(self, sorted_R: torch.Tensor, num_rows: int) -> torch.Tensor:
        """[R]: where the sorted slots stand among the padded rows; M if masked."""
        ends_e = torch.searchsorted(sorted_R, self.experts, right=True)
        counts_e = torch.diff(ends_e, prepend=ends_e.new_zeros(1))
        padding_e = -counts_e % ALIGNMENT
        before_e = F.pad(padding_e.cumsum(0), (1, 0))  # the last is of masked slots
        row_R = torch.arange(sorted_R.numel(), device=sorted_R.device) + before_e[sorted_R]
        return row_R.masked_fill_(sorted_R == self.local, num_rows)
