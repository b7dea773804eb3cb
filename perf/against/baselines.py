"""What the layer is compared with: the same whole layer made of torch operations.

Two forms of each. Where one GPU holds all experts (BASELINES): sort the slots by expert, gather,
FC1, SwiGLU, router weight, FC2, gather back, sum over the slots. Nothing in it waits for the host
and no shape depends on the routing, so a CUDA graph can capture it unless the experts' arithmetic
needs the host. With a process per GPU (PROCESS_BASELINES) all-to-alls bring rows to their experts
and back; the host reads how many, so it runs eagerly. `experts` has the arithmetic: BF16 rounds as
the oracle does, and FC1 and silu(gate) to bf16 as well; FP8 rounds tokens, weights and hidden rows
to FP8, and sends tokens in FP8. All run on the CPU too. `deepep` is made of other libraries.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamoe.precision import Precision
from perf.against import deepep
from perf.against.experts import Bf16Experts, Fp8Experts, Packed


class _Torch:
    """The layer over weights in checkpoint layout, w13 [e, 2I, H] gate then up and w2 [e, H, I].

    `scales`: of w13 and w2, if they are quantised already (`megamoe.reference.Weights`); FP8 only.
    `masked` says whether topk_idx may hold -1; without masks a few small launches are saved.
    Attributes that a measurement reads: `capturable`, a CUDA graph can hold it; `max_error`, the
    largest relative error against the oracle; `config`, what a result row says of its form;
    `quantised`, it takes the layer's quantised weights and scales instead of bf16 weights.
    """

    arithmetic: type = Bf16Experts
    quantised = False

    def __init__(
        self,
        w13_e2IH: torch.Tensor,
        w2_eHI: torch.Tensor,
        num_ranks: int = 1,
        masked: bool = True,
        scales: tuple[torch.Tensor, ...] = (),
    ):
        self.multiply = self.arithmetic(w13_e2IH, w2_eHI, *scales)
        self.config, self.max_error = self.multiply.config, self.multiply.max_error
        self.num_ranks, self.local, self.masked = num_ranks, w13_e2IH.shape[0], masked
        self.num_experts = num_ranks * self.local
        self.experts = torch.arange(self.num_experts, dtype=torch.int32, device=w13_e2IH.device)
        #: Local expert of every count that arrives: by source rank, then by expert.
        self.expert_of_count = self.experts % self.local

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a call: the host reads nothing in it."""
        return False

    def _sorted(self, topk_idx_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(ids of the slots by expert, their slots, last position + 1 of each expert [E])."""
        ids_R = topk_idx_TK.flatten().to(torch.int32)
        if self.masked:  # masked slots sort behind the last expert and belong to none
            ids_R = ids_R.masked_fill(ids_R < 0, self.num_experts)
        sorted_R, slot_R = torch.sort(ids_R)
        ends_E = torch.searchsorted(sorted_R, self.experts, right=True, out_int32=True)
        return sorted_R, slot_R, ends_E


class TorchBf16(_Torch):
    """The whole layer, in one process."""

    @property
    def capturable(self) -> bool:
        return self.multiply.capturable

    def __call__(
        self, x_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] bf16: a new tensor (in a captured graph, the same one at every replay)."""
        num_tokens, top_k = topk_idx_TK.shape
        if num_tokens == 0:
            return torch.empty_like(x_TH)
        sorted_R, slot_R, offsets_E = self._sorted(topk_idx_TK)
        rows = _select(self.multiply.pack(x_TH), slot_R // top_k)
        weights_R = topk_weights_TK.flatten().index_select(0, slot_R)
        out_RH = self.multiply(rows, offsets_E, weights_R)

        row_R = torch.empty_like(slot_R)
        row_R.scatter_(0, slot_R, torch.arange(slot_R.numel(), device=slot_R.device))
        if self.masked:  # rows of no group were never written: read zeros of the last row instead
            last = out_RH[-1]
            last.copy_(torch.where(sorted_R[-1] < self.num_experts, last, torch.zeros_like(last)))
            row_R.masked_fill_(topk_idx_TK.flatten() < 0, out_RH.shape[0] - 1)
        slots_TKH = out_RH.index_select(0, row_R).view(num_tokens, top_k, -1)
        return slots_TKH.sum(dim=1)  # accumulated in float32, rounded once


class ExchangedTorchBf16(_Torch):
    """The layer of one rank over the weights of its own experts, e of E; collective over the
    default process group. Row counts, rows (their scales apart) and results travel in all-to-alls.
    """

    def __call__(
        self, x_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] bf16: a new tensor."""
        num_tokens, top_k = topk_idx_TK.shape
        _, slot_R, ends_E = self._sorted(topk_idx_TK)
        to_WE = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).view(self.num_ranks, self.local)
        from_WE = torch.empty_like(to_WE)
        dist.all_to_all_single(from_WE, to_WE)
        sent, received = torch.stack([to_WE.sum(dim=1), from_WE.sum(dim=1)]).tolist()  # host waits

        slot_R = slot_R[: sum(sent)]
        rows = _select(self.multiply.pack(x_TH), slot_R // top_k)
        arrived = tuple(_exchange(part, sent, received) for part in rows)
        results_RH = self._experts(arrived, from_WE, x_TH)
        slots_RH = _exchange(results_RH, received, sent)

        blank = torch.zeros if self.masked else torch.empty
        slots_TKH = blank(num_tokens * top_k, x_TH.shape[1], dtype=x_TH.dtype, device=x_TH.device)
        slots_TKH = slots_TKH.index_copy_(0, slot_R, slots_RH).view(num_tokens, top_k, -1)
        slots_TKH.mul_(topk_weights_TK.unsqueeze(2))
        return slots_TKH.sum(dim=1)  # accumulated in float32, rounded once

    def _experts(self, rows: Packed, from_WE: torch.Tensor, like_TH: torch.Tensor) -> torch.Tensor:
        """Every row through its expert; rows are in the order of `from_WE`, rank by rank."""
        num_rows = rows[0].shape[0]
        if num_rows == 0:
            return like_TH[:0]
        counts = from_WE.flatten().long()
        expert_R = self.expert_of_count.repeat_interleave(counts, output_size=num_rows)
        order_R = torch.sort(expert_R, stable=True).indices
        offsets_E = from_WE.sum(dim=0).cumsum(0).to(torch.int32)
        out_RH = self.multiply(_select(rows, order_R), offsets_E)
        return torch.empty_like(out_RH).index_copy_(0, order_R, out_RH)


def _select(rows: Packed, index_R: torch.Tensor) -> Packed:
    return tuple(part.index_select(0, index_R) for part in rows)


def _exchange(rows_RH: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """All-to-all of rows, which are in rank order on both sides."""
    arrived_RH = rows_RH.new_empty(sum(received), rows_RH.shape[1])
    dist.all_to_all_single(arrived_RH, rows_RH, received, sent)
    return arrived_RH


class TorchFp8(TorchBf16):
    arithmetic = Fp8Experts


class ExchangedTorchFp8(ExchangedTorchBf16):
    arithmetic = Fp8Experts


Baseline = TorchBf16 | ExchangedTorchBf16 | deepep.DeepEpDeepGemm
BASELINES: dict[str, type[TorchBf16]] = {"torch_bf16": TorchBf16, "torch_fp8": TorchFp8}
PROCESS_BASELINES: dict[str, type[Baseline]] = {
    "torch_bf16": ExchangedTorchBf16,
    "torch_fp8": ExchangedTorchFp8,
    deepep.NAME: deepep.DeepEpDeepGemm,
}
#: Torch with operands of the same width, by what tensor cores multiply.
BASELINE_OF = {"bfloat16": "torch_bf16", "float8_e4m3fn": "torch_fp8"}


def baseline_name(recipe: Precision) -> str:
    """The baseline of a recipe."""
    return BASELINE_OF[recipe.tokens.mma]
