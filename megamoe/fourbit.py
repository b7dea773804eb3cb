"""4-bit expert weights as checkpoints hold them: MXFP4 and INT4, their values and quantisers.

Owns the two formats. Two codes lie in a byte, that of column 2i in its low nibble.

    MXFP4   float4_e2m1 (bit 3 is the sign), one exponent byte per 32 columns: 2 ** (byte - 127);
            255 is NaN and refused. OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6.3.
    INT4    two's complement, -8..7, one BF16 or float32 scale per 128 columns.

`scales` are the exponents or the scales; their dtype says which format it is, and so does the
operand of a recipe (`format_of`). Works on tensors of any device, one expert after the other, to
spare memory. Neighbours: `fourbit_pack` lays weights out for the kernel, `weights` owns the other
precisions.

Legend: e experts, N output channels, K columns; G groups of a row that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megamoe import precision
from megamoe.fourbit_layout import E2M1
from megamoe.precision import FP8_BLOCK, Operand

EXPONENT_BIAS = 127
NAN_EXPONENT = 255
#: floor(log2) of the largest magnitudes of float4_e2m1 and of float8_e4m3fn.
E2M1_TOP = 2
E4M3_TOP = 8
INT4_MAX = 7
#: (point half way to the next magnitude, whether that is where it is rounded to: the even code).
_E2M1_MIDPOINTS = [
    ((low + high) / 2, code % 2 == 1)
    for code, (low, high) in enumerate(zip(E2M1, E2M1[1:], strict=False))
]


@dataclass(frozen=True)
class Format:
    """operand: what recipes call it; values: of the 16 codes, without their scale; scale_dtypes:
    those that checkpoints may have, first the operand's, which holds the others exactly.
    """

    name: str
    operand: Operand
    values: tuple[float, ...]
    scale_dtypes: tuple[torch.dtype, ...]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.operand.scale_columns

    def pairs(self, device: torch.device) -> torch.Tensor:
        """The two values of every byte: float32 [256, 2]."""
        values = torch.tensor(self.values, device=device)
        return torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)

    def own_scales(self, scales: Any) -> Any:
        """Scales of one of `scale_dtypes` in the first of them; anything else as it is."""
        own = self.scale_dtypes[0]
        if not isinstance(scales, torch.Tensor) or scales.dtype not in self.scale_dtypes:
            return scales
        return scales.view(own) if scales.dtype.itemsize == own.itemsize else scales.to(own)


MXFP4 = Format(
    "mxfp4",
    precision.MXFP4,
    E2M1 + tuple(-value for value in E2M1),
    (torch.uint8, torch.float8_e8m0fnu),
)
INT4 = Format(
    "int4",
    precision.INT4,
    (*map(float, range(8)), *map(float, range(-8, 0))),
    (torch.float32, torch.bfloat16),
)
FORMATS = {form.name: form for form in (MXFP4, INT4)}
_SCALE_DTYPES = {dtype: form for form in FORMATS.values() for dtype in form.scale_dtypes}


def format_of(operand: Operand) -> Format:
    """The format of a packed operand that is one of `precision.PACKED`."""
    (form,) = [form for form in FORMATS.values() if form.operand == operand]
    return form


class Fp8Block(NamedTuple):
    """stored: float8_e4m3fn [e, N, K]; scale: float32 [e, N/128, K/128]; num_inexact_blocks: of
    those blocks, how many have a value that is not stored exactly.
    """

    stored: torch.Tensor
    scale: torch.Tensor
    num_inexact_blocks: int


# ---------------------------------------------------------------- what is legal
def check_dimensions(name: str, tensor: object, num_dimensions: int) -> None:
    """Raise ValueError, naming the argument, unless it is a tensor of so many dimensions."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != num_dimensions:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected {num_dimensions} dimensions"
        )


def _check_all(name: str, good_ENG: torch.Tensor, what: str) -> None:
    if not bool(good_ENG.all()):
        expert, row, group = (~good_ENG).nonzero()[0].tolist()
        raise ValueError(f"{name} has {what} at expert {expert}, row {row}, group {group}")


def check_scales(name: str, scales_ENG: torch.Tensor) -> None:
    """Raise ValueError, naming the argument, expert, row and group, for an exponent that is NaN and
    for a scale that is not finite. Waits for the device.
    """
    if scales_ENG.dtype != torch.uint8:
        _check_all(name, torch.isfinite(scales_ENG), "a scale that is not finite")
    elif scales_ENG.numel() and int(scales_ENG.max()) == NAN_EXPONENT:
        good_ENG = scales_ENG != NAN_EXPONENT
        _check_all(name, good_ENG, f"the exponent {NAN_EXPONENT} (NaN)")


def check_checkpoint(codes: torch.Tensor, scales: torch.Tensor) -> tuple[Format, torch.Tensor]:
    """(format, scales in its own dtype) of weights in checkpoint layout.

    codes: uint8 [e, N, K/2]; scales: uint8 or float8_e8m0fnu [e, N, K/32], or bfloat16 or float32
    [e, N, K/128]. Raises ValueError, naming the argument, for another dtype, shape or device, for K
    that is no multiple of 128, and for a scale that is NaN or infinite, with its expert, row and
    group. Waits for the device.
    """
    check_dimensions("codes", codes, 3)
    check_dimensions("scales", scales, 3)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes has dtype {codes.dtype}, expected {torch.uint8}")
    if scales.dtype not in _SCALE_DTYPES:
        raise ValueError(f"scales has dtype {scales.dtype}, expected one of {[*_SCALE_DTYPES]}")
    if scales.device != codes.device:
        raise ValueError(f"scales is on device {scales.device}, codes on {codes.device}")
    form = _SCALE_DTYPES[scales.dtype]
    experts, rows, columns = *codes.shape[:2], 2 * codes.shape[2]
    if columns % FP8_BLOCK:
        raise ValueError(f"codes has shape {list(codes.shape)}: K={columns} is no multiple of 128")
    expected = [experts, rows, columns // form.group]
    if list(scales.shape) != expected:
        raise ValueError(
            f"scales has shape {list(scales.shape)}, expected {expected} for {form.name} codes of "
            f"shape {list(codes.shape)}"
        )
    own = form.own_scales(scales)
    check_scales("scales", own)
    return form, own


# ---------------------------------------------------------------- values
def exp2(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** exponents, exactly: float32 of int32 -149..127. Two factors reach subnormals."""
    half = exponents >> 1
    low, high = (((part + 127) << 23).view(torch.float32) for part in (half, exponents - half))
    return low * high


def _values_of(codes_NB: torch.Tensor, pairs: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Values without their scales, by group: float32 [N, G, columns]."""
    values = pairs.index_select(0, codes_NB.reshape(-1).int())
    return values.view(codes_NB.shape[0], num_groups, -1)


def _exponents_of(scales: torch.Tensor) -> torch.Tensor:
    return scales.int() - EXPONENT_BIAS


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values of weights in checkpoint layout: float32 [e, N, K].

    Arguments and ValueErrors as in `check_checkpoint`. Exact for MXFP4 (values past float32, with
    exponents from 252 on, become infinite), rounded once for INT4.
    """
    form, scales = check_checkpoint(codes, scales)
    experts, rows, columns = codes.shape
    out = torch.empty(experts, rows, 2 * columns, dtype=torch.float32, device=codes.device)
    pairs = form.pairs(codes.device)
    for expert in range(experts):
        own = scales[expert]
        factors = exp2(_exponents_of(own)) if form is MXFP4 else own
        values = _values_of(codes[expert], pairs, own.shape[1])
        torch.mul(values, factors.unsqueeze(-1), out=out[expert].view(values.shape))
    return out


def multiplied(
    codes: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values [e, N, K], scales of sums [e, N, G] or None), float32, of weights in a checkpoint,
    as the kernel has them: exponents are part of MXFP4's values, an INT4 scale multiplies the sums
    over its columns. Exact. Arguments and ValueErrors as in `check_checkpoint`.
    """
    form, own = check_checkpoint(codes, scales)
    if form.operand.scales_values:
        return dequantize(codes, own), None
    return dequantize(codes, torch.ones_like(own)), own


# ---------------------------------------------------------------- quantisers
def round_to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest float4_e2m1, ties to the even code, saturating: uint8 0..15. Zeros and
    what is rounded to them keep their sign.
    """
    magnitudes = values.abs()
    codes = torch.signbit(values).to(torch.uint8) << 3
    for midpoint, is_rounded_up in _E2M1_MIDPOINTS:
        codes += magnitudes >= midpoint if is_rounded_up else magnitudes > midpoint
    return codes


def join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two neighbours of the last axis in a byte, the first in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _check_weights(weights: torch.Tensor, scale: torch.Tensor | None, group: int) -> None:
    check_dimensions("weights", weights, 3)
    experts, rows, columns = weights.shape
    if columns % group:
        raise ValueError(
            f"weights has shape {list(weights.shape)}: K={columns} is no multiple of {group}"
        )
    if weights.dtype != torch.float8_e4m3fn:
        if weights.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"weights has dtype {weights.dtype}, expected bfloat16, float16, float32 or "
                "float8_e4m3fn"
            )
        if scale is not None:
            raise ValueError(f"scale is given, but weights of dtype {weights.dtype} have none")
        return
    if scale is None:
        raise ValueError("scale is missing: weights of dtype float8_e4m3fn have one per block")
    check_dimensions("scale", scale, 3)
    if rows % FP8_BLOCK or columns % FP8_BLOCK:
        raise ValueError(
            f"weights has shape {list(weights.shape)}: N and K must be multiples of {FP8_BLOCK}"
        )
    expected = [experts, rows // FP8_BLOCK, columns // FP8_BLOCK]
    if list(scale.shape) != expected:
        raise ValueError(f"scale has shape {list(scale.shape)}, expected {expected}")
    if scale.dtype != torch.float32:
        raise ValueError(f"scale has dtype {scale.dtype}, expected {torch.float32}")
    if scale.device != weights.device:
        raise ValueError(f"scale is on device {scale.device}, weights on {weights.device}")


def _groups_of(
    weights: torch.Tensor, scale: torch.Tensor | None, expert: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [N, G, columns], largest magnitudes [N, G]) of an expert, float32. Raises ValueError
    for what is not finite.
    """
    values = weights[expert].float()
    rows, columns = values.shape
    if scale is not None:
        blocks = values.view(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
        values = (blocks * scale[expert][:, None, :, None]).view(rows, columns)
    values = values.reshape(rows, columns // group, group)
    amax = values.abs().amax(dim=-1)
    if not bool(torch.isfinite(amax).all()):
        row, at = (~torch.isfinite(amax)).nonzero()[0].tolist()
        raise ValueError(
            f"weights has a value that is not finite at expert {expert}, row {row}, group {at}"
        )
    return values, amax


@torch.no_grad()
def quantize_mxfp4(
    weights: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [e, N, K/2], exponents uint8 [e, N, K/32]) of weights [e, N, K].

    weights: bfloat16, float16 or float32, or float8_e4m3fn with float32 `scale` [e, N/128, K/128]
    ("fp8_block"; the products are rounded to float32 first). By OCP Microscaling Formats (MX) v1.0,
    section 6.3: a group's exponent is floor(log2(largest magnitude)) - 2, not below -127, and its
    values are rounded to the nearest, ties to even, and saturate at 6. A group of zeros has
    exponent byte 0. Raises ValueError, naming the argument, for other dtypes and shapes, and for a
    value that is not finite, with its expert, row and group.
    """
    _check_weights(weights, scale, MXFP4.group)
    experts, rows, columns = weights.shape
    codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=weights.device)
    exponents = codes.new_empty(experts, rows, columns // MXFP4.group)
    for expert in range(experts):
        values, amax = _groups_of(weights, scale, expert, MXFP4.group)
        # frexp has its fraction in 1/2..1, so that its exponent is one above floor(log2).
        biased = torch.frexp(amax).exponent - 1 - E2M1_TOP + EXPONENT_BIAS
        biased = torch.where(amax == 0, 0, biased).clamp_min(0)
        rounded = round_to_e2m1(values * exp2(EXPONENT_BIAS - biased).unsqueeze(-1))
        codes[expert] = join_nibbles(rounded).view(rows, -1)
        exponents[expert] = biased
    return codes, exponents


@torch.no_grad()
def quantize_int4(
    weights: torch.Tensor, scale: torch.Tensor | None = None, columns: int = INT4.group
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [e, N, K/2], float32 scales [e, N, K/columns]) of weights [e, N, K].

    Arguments and ValueErrors as in `quantize_mxfp4`; the kernel wants 128 `columns` to share a
    scale. scale = largest magnitude / 7, code = value / scale rounded to the nearest, ties to even,
    within -7..7: -8 is never made. Every operation is rounded to float32: the same bits on every
    device.
    """
    if columns < 2 or columns % 2:
        raise ValueError(f"columns={columns!r} must be positive and even")
    _check_weights(weights, scale, columns)
    experts, rows, width = weights.shape
    codes = torch.empty(experts, rows, width // 2, dtype=torch.uint8, device=weights.device)
    scales = codes.new_empty(experts, rows, width // columns, dtype=torch.float32)
    for expert in range(experts):
        values, amax = _groups_of(weights, scale, expert, columns)
        # A tensor: a GPU divides by a number as if by multiplying with its inverse.
        own = amax / amax.new_full((), INT4_MAX)
        scaled = values / torch.where(own > 0, own, 1.0).unsqueeze(-1)
        rounded = scaled.round().clamp(-INT4_MAX, INT4_MAX).to(torch.int8).view(torch.uint8) & 15
        codes[expert] = join_nibbles(rounded).view(rows, -1)
        scales[expert] = own
    return codes, scales


#: By format: (codes, scales) of weights.
QUANTIZERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    MXFP4.name: quantize_mxfp4,
    INT4.name: quantize_int4,
}


# ---------------------------------------------------------------- to FP8
def to_fp8_block(codes: torch.Tensor, scales: torch.Tensor) -> Fp8Block:
    """MXFP4 weights as "fp8_block" takes them: e4m3 with a scale per 128 x 128 block.

    Scales are powers of two that bring a block's largest magnitude to 256 or 384, where there is
    most room below: every value is exact if the exponents of a block differ by up to 14. Others are
    rounded to the nearest, and their blocks are counted. A block of zeros has scale 1. Arguments
    and ValueErrors as in `check_checkpoint`; N is a multiple of 128, and INT4 is refused.
    """
    form, scales = check_checkpoint(codes, scales)
    if form is not MXFP4:
        raise ValueError(f"scales has dtype {scales.dtype}, expected exponents: uint8")
    experts, rows, columns = *codes.shape[:2], 2 * codes.shape[2]
    if rows % FP8_BLOCK:
        raise ValueError(f"codes has shape {list(codes.shape)}: N={rows} is no multiple of 128")
    grid = rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK // form.group
    device = codes.device
    stored = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(experts, *grid[::2], dtype=torch.float32, device=device)
    num_inexact = torch.zeros((), dtype=torch.int64, device=device)
    pairs, nothing = form.pairs(device), -1000
    for expert in range(experts):
        groups = codes[expert].reshape(rows, scales.shape[2], -1)
        top = torch.maximum(groups & 7, (groups >> 4) & 7).amax(dim=-1).int()
        exponents = _exponents_of(scales[expert])
        # Codes 1, 2..3, 4..5, 6..7 have floor(log2) -1, 0, 1, 2.
        log2 = torch.where(top > 0, exponents + (top >> 1) - 1, nothing).view(grid).amax((1, 3))
        shift = torch.where(log2 > nothing, log2 - E4M3_TOP, 0)
        # Bounded where the sign of what is left, zero or far below e4m3, is all that counts.
        factors = exp2((exponents.view(grid) - shift[:, None, :, None]).clamp(-60, 60))
        values = _values_of(groups, pairs, groups.shape[1])
        values *= factors.view(rows, -1, 1)
        own = values.to(torch.float8_e4m3fn)
        differs = (own.float() != values).view(rows // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
        num_inexact += differs.any(dim=3).any(dim=1).sum()
        stored[expert], scale[expert] = own.view(rows, columns), exp2(shift)
    return Fp8Block(stored, scale, int(num_inexact))


def to_fp8(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [e, N, K], float32 scales) of weights: MXFP4 by `to_fp8_block`, INT4 exactly,
    with the scales [e, N, K/128] that it has. Arguments and ValueErrors as there.
    """
    form, scales = check_checkpoint(codes, scales)
    if form.operand.scales_values:
        made = to_fp8_block(codes, scales)
        return made.stored, made.scale
    experts, rows, row_bytes = codes.shape
    stored = codes.new_empty(experts, rows, 2 * row_bytes, dtype=torch.float8_e4m3fn)
    pairs = form.pairs(codes.device)
    for expert in range(experts):
        stored[expert] = _values_of(codes[expert], pairs, scales.shape[2]).view(rows, -1)
    return stored, scales
