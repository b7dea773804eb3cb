"""The experts' arithmetic in torch operations: what the baselines do with rows sorted by expert.

A class holds the weights of e experts and offers `pack`, tokens as they travel to their experts (a
tuple of tensors, row by row), and a call, FC1 to FC2 of packed rows. Letters: R rows sorted by
expert, e experts, H hidden, I intermediate, K and N depth and width of a product.

FP8 has two forms. "grouped": one scale per row and per weight row, `torch._scaled_grouped_mm` over
all experts at once; these are the finest scales that it takes on Hopper, and it needs no counts on
the host. "blocked", where torch has no such product: one scale per 128 columns of a row and per 128
x 128 weights, or per 128 columns of a weight row, a `torch._scaled_mm` per expert. On a CPU both
multiply the dequantised operands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megamoe.precision import FP8_BLOCK, FP8_MAX

#: Relative errors against the oracle, which multiplies bf16 operands, above this are no rounding.
#: FP8 keeps 3 bits behind the leading one, a relative error of 0.026 (root mean square). Tokens,
#: w13, hidden rows and w2 are rounded, and gate and up carry the first two: about 0.07 in all.
MAX_ERROR, MAX_FP8_ERROR = 2e-2, 0.1

FP8 = torch.float8_e4m3fn
GROUPED, BLOCKED = "grouped", "blocked"
#: cuBLAS takes scales per 128 columns of a multiple of this many rows.
ROW_MULTIPLE = 4

Packed = tuple[torch.Tensor, ...]


def hidden_rows(
    gate_up_R2I: torch.Tensor, weights_R: torch.Tensor | None, clamp: float | None = None
) -> torch.Tensor:
    """SwiGLU, clamped as `megamoe.reference.swiglu` does, and the router weight if there is one:
    [R, I].
    """
    gate, up = gate_up_R2I.chunk(2, dim=1)
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    hidden_RI = F.silu(gate).mul_(up)
    return hidden_RI if weights_R is None else hidden_RI.mul_(weights_R.unsqueeze(1))


class Bf16Experts:
    """w13 [e, 2I, H] gate then up, w2 [e, H, I], bf16; the weights are not copied."""

    capturable, max_error, config = True, MAX_ERROR, ""

    def __init__(self, w13_e2IH: torch.Tensor, w2_eHI: torch.Tensor):
        self.w13_eH2I = w13_e2IH.transpose(1, 2)
        self.w2_eIH = w2_eHI.transpose(1, 2)

    def pack(self, x_TH: torch.Tensor) -> Packed:
        return (x_TH,)

    def __call__(
        self, rows: Packed, offsets_e: torch.Tensor, weights_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[R, H] bf16; int32 `offsets_e` are the experts' last rows + 1. Rows after them are
        undefined.
        """
        (rows_RH,) = rows
        hidden_RI = hidden_rows(
            torch._grouped_mm(rows_RH, self.w13_eH2I, offs=offsets_e), weights_R
        )
        return torch._grouped_mm(hidden_RI, self.w2_eIH, offs=offsets_e)


def _scale_of(largest: torch.Tensor) -> torch.Tensor:
    """float32 such that value / scale fits FP8; 1 where all values are 0."""
    scale = largest.float() / FP8_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantise_rows(
    x_RK: torch.Tensor, columns: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(FP8 [R, K], float32 scales [R, K / columns], or [R, 1] without `columns`)."""
    num_rows, depth = x_RK.shape
    blocks = x_RK.view(num_rows, -1, columns or depth)
    scale = _scale_of(blocks.abs().amax(dim=2))
    return (blocks / scale.unsqueeze(2)).to(FP8).view(num_rows, depth), scale


def quantise_blocks(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(FP8 [N, K], float32 scales [N / 128, K / 128])."""
    width, depth = w_NK.shape
    blocks = w_NK.view(width // FP8_BLOCK, FP8_BLOCK, depth // FP8_BLOCK, FP8_BLOCK)
    scale = _scale_of(blocks.abs().amax(dim=(1, 3)))
    return (blocks / scale[:, None, :, None]).to(FP8).view(width, depth), scale


def dequantise(q_NK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K]; every scale covers an equal part of the rows and of the columns."""
    rows, columns = (of // by for of, by in zip(q_NK.shape, scale.shape, strict=True))
    return q_NK.float() * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def fp8_form(device: torch.device) -> str:
    """The form that torch offers for this device."""
    known = hasattr(torch, "_scaled_grouped_mm")
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
    return GROUPED if known and hopper else BLOCKED


class Fp8Experts:
    """Weights as `Bf16Experts` takes them, quantised once, or with scales as `megamoe` has them and
    quantised already: blocked with several along a row, else grouped. Rows are quantised in every
    call. Packed rows are FP8 bytes, which index and collective operations take, and their scales.
    """

    max_error = MAX_FP8_ERROR

    def __init__(
        self,
        w13_e2IH: torch.Tensor,
        w2_eHI: torch.Tensor,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
    ):
        if w13_scale is None:
            self.form = fp8_form(w13_e2IH.device)
        else:
            self.form = BLOCKED if w13_scale.dim() == 3 else GROUPED
        self.capturable = self.form == GROUPED  # else the host reads where experts begin
        self.columns = None if self.form == GROUPED else FP8_BLOCK
        self.config = f"form={self.form} scales={'row' if self.form == GROUPED else '1x128'}"
        self.w13 = self._weights(w13_e2IH, w13_scale)
        self.w2 = self._weights(w2_eHI, w2_scale)

    def _weights(
        self, w_eNK: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(FP8 [e, N, K], scales [e, N, 1], [e, N / 128, K / 128] or [e, N, K / 128]), an expert at
        a time: no float32 copy of all, and no copy of what is quantised already.
        """
        if scale is not None:
            return w_eNK, scale if self.form == BLOCKED else scale.unsqueeze(2)
        data = torch.empty(w_eNK.shape, dtype=FP8, device=w_eNK.device)
        scales = []
        for expert, w_NK in enumerate(w_eNK):
            quantised = quantise_rows(w_NK) if self.form == GROUPED else quantise_blocks(w_NK)
            data[expert] = quantised[0]
            scales.append(quantised[1])
        return data, torch.stack(scales)

    def pack(self, x_TH: torch.Tensor) -> Packed:
        data, scale = quantise_rows(x_TH, self.columns)
        return data.view(torch.uint8), scale

    def __call__(
        self, rows: Packed, offsets_e: torch.Tensor, weights_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[R, H] bf16; see `Bf16Experts`."""
        data_RH, scale = rows
        gate_up_R2I = self._product(data_RH.view(FP8), scale, *self.w13, offsets_e)
        hidden = quantise_rows(hidden_rows(gate_up_R2I, weights_R), self.columns)
        return self._product(*hidden, *self.w2, offsets_e)

    def _product(
        self,
        rows_RK: torch.Tensor,
        scale: torch.Tensor,
        w_eNK: torch.Tensor,
        w_scale: torch.Tensor,
        offsets_e: torch.Tensor,
    ) -> torch.Tensor:
        """[R, N] bf16: every row by its expert's weights."""
        if rows_RK.device.type == "cuda" and self.form == GROUPED:
            return torch._scaled_grouped_mm(
                rows_RK,
                w_eNK.transpose(1, 2),
                scale.squeeze(1),
                w_scale.squeeze(2),
                offs=offsets_e,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        multiply = _blocked_mm if rows_RK.device.type == "cuda" else _dequantised_mm
        shape = (rows_RK.shape[0], w_eNK.shape[1])
        out_RN = torch.empty(shape, dtype=torch.bfloat16, device=rows_RK.device)
        begin = 0
        for expert, end in enumerate(offsets_e.tolist()):
            if end > begin:
                own = slice(begin, end)
                out_RN[own] = multiply(rows_RK[own], scale[own], w_eNK[expert], w_scale[expert])
            begin = end
        return out_RN


def _dequantised_mm(rows_MK, scale, w_NK, w_scale) -> torch.Tensor:
    """[M, N] float32."""
    return dequantise(rows_MK, scale) @ dequantise(w_NK, w_scale).T


def _blocked_mm(rows_MK, scale, w_NK, w_scale) -> torch.Tensor:
    """[M, N] bf16 by torch._scaled_mm with a scale per 128 columns, stored column by column, and
    per 128 x 128 weights or, stored in the same way, per 128 columns of their rows.
    """
    num_rows = rows_MK.shape[0]
    rest = -num_rows % ROW_MULTIPLE
    if rest:
        rows_MK = F.pad(rows_MK.view(torch.uint8), (0, 0, 0, rest)).view(FP8)
        scale = F.pad(scale, (0, 0, 0, rest), value=1.0)
    of_weights = w_scale.t()
    if len(w_scale) == len(w_NK):
        of_weights = of_weights.contiguous()
    return torch._scaled_mm(
        rows_MK,
        w_NK.t(),
        scale_a=scale.t().contiguous().t(),
        scale_b=of_weights,
        out_dtype=torch.bfloat16,
    )[:num_rows]
