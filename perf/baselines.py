"""What the layer is compared with: the same whole layer made of torch operations.

By name in BASELINES. `torch_bf16` serves every rank's tokens on the one GPU that holds all experts:
sort the slots by expert, gather, grouped GEMM, SwiGLU, router weight, grouped GEMM, gather back,
sum over the slots. Nothing in it waits for the host and no shape depends on the routing, so a CUDA
graph can capture it. Rounding: as the oracle's, and FC1 and silu(gate) are rounded to bf16 as well.
It runs on the CPU too, through the same operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class TorchBf16:
    """The layer over weights in checkpoint layout, w13 [E, 2I, H] gate then up and w2 [E, H, I].

    The weights are not copied. `masked` says whether topk_idx may hold -1; without masks a few
    small launches are saved.
    """

    def __init__(self, w13_E2IH: torch.Tensor, w2_EHI: torch.Tensor, masked: bool = True):
        self.w13_EH2I = w13_E2IH.transpose(1, 2)
        self.w2_EIH = w2_EHI.transpose(1, 2)
        self.masked = masked
        self.experts = torch.arange(w13_E2IH.shape[0], dtype=torch.int32, device=w13_E2IH.device)

    @property
    def num_experts(self) -> int:
        return self.experts.numel()

    def __call__(
        self, x_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] bf16: a new tensor (in a captured graph, the same one at every replay)."""
        num_tokens, top_k = topk_idx_TK.shape
        if num_tokens == 0:
            return torch.empty_like(x_TH)
        ids_R = topk_idx_TK.flatten().to(torch.int32)
        if self.masked:  # masked slots sort behind the last expert and belong to no group
            ids_R = ids_R.masked_fill(ids_R < 0, self.num_experts)
        sorted_R, slot_R = torch.sort(ids_R)
        offsets_E = torch.searchsorted(sorted_R, self.experts, right=True, out_int32=True)

        rows_RH = x_TH.index_select(0, slot_R // top_k)
        gate, up = torch._grouped_mm(rows_RH, self.w13_EH2I, offs=offsets_E).chunk(2, dim=1)
        hidden_RI = F.silu(gate).mul_(up)
        hidden_RI.mul_(topk_weights_TK.flatten().index_select(0, slot_R).unsqueeze(1))
        out_RH = torch._grouped_mm(hidden_RI, self.w2_EIH, offs=offsets_E)

        row_R = torch.empty_like(slot_R)
        row_R.scatter_(0, slot_R, torch.arange(slot_R.numel(), device=slot_R.device))
        if self.masked:  # rows of no group were never written: read zeros of the last row instead
            last = out_RH[-1]
            last.copy_(torch.where(sorted_R[-1] < self.num_experts, last, torch.zeros_like(last)))
            row_R.masked_fill_(topk_idx_TK.flatten() < 0, out_RH.shape[0] - 1)
        slots_TKH = out_RH.index_select(0, row_R).view(num_tokens, top_k, -1)
        return slots_TKH.sum(dim=1)  # accumulated in float32, rounded once


BASELINES = {"torch_bf16": TorchBf16}
