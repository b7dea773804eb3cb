"""4-bit expert weights laid out for the kernel, and back.

Owns the packed form: chunks as `fourbit_layout` describes them, and a float32 scale per weight row.
The kernel's table holds magnitudes that an exponent of -5..6 is added to, so exponents of MXFP4 are
stored relative to their row's, and it has a sign for 0..7, so INT4's -8 becomes -7. What that
changes is counted. Neighbours: `fourbit` owns the formats of checkpoints.

Legend: e experts, N weight rows, R those and padding, K columns, G groups of a row that share a
scale, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megamoe.fourbit import (
    EXPONENT_BIAS,
    FORMATS,
    INT4,
    MXFP4,
    Format,
    check_checkpoint,
    check_dimensions,
    join_nibbles,
    round_to_e2m1,
)
from megamoe.fourbit_layout import (
    CHUNK_BYTES,
    CHUNK_COLUMNS,
    CHUNKS_PER_TILE,
    CODE_BYTES,
    MAX_EXPONENT,
    MIN_EXPONENT,
    TILE_ROWS,
)

GATE_UP = "gate_up"  # w13 [2I, H]: gate rows, then up rows
DOWN = "down"  # w2 [H, I]
#: What the rows of a matrix are, from the outermost axis; every one has a size but the tiles.
_ROW_AXES = {
    GATE_UP: (
        "half", "tile", "g_high", "warpgroup", "warp_high", "warp_low", "g_low", "block"
    ),
    DOWN: ("tile", "warpgroup", "warp_high", "warp_low", "block", "half", "g_high", "g_low"),
}  # fmt: skip
_SIZES = {"tile": -1, "warpgroup": 2, "block": 2, "half": 2}
_SIZES |= {"warp_high": 2, "warp_low": 2, "g_high": 4, "g_low": 2}
_SIZES |= {"k_block": -1, "s_high": 2, "s_low": 2, "khalf": 2, "t": 4, "byte": 2}
#: Matrices have their rows in multiples of this.
_ROW_MULTIPLE = {GATE_UP: TILE_ROWS, DOWN: TILE_ROWS // 2}
_ALIGNMENT = 16  # bytes: what bulk copies of the kernel ask of an address
#: From this shift on every e2m1 magnitude is rounded to 0.
_MAX_SHIFT = 5
_MAGNITUDES, _SIGNS = 0x77, 0x88  # of the two codes of a byte


class Packed(NamedTuple):
    """Weights of e experts as the kernel reads them.

    chunks: uint8 [e, tiles, K/128, 4, CHUNK_BYTES]; row_scale: float32 [e, N] in the order of the
    checkpoint, what a row's sums are multiplied by (ones for INT4).
    """

    chunks: torch.Tensor
    row_scale: torch.Tensor


# ---------------------------------------------------------------- shapes
def _check_order(order: str) -> None:
    if order not in _ROW_AXES:
        raise ValueError(f"order={order!r} is not one of {sorted(_ROW_AXES)}")


def _num_tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS)


def packed_shapes(
    experts: int, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every field of `Packed` for weights [experts, rows, columns]."""
    grid = _num_tiles(rows), columns // CHUNK_COLUMNS, CHUNKS_PER_TILE, CHUNK_BYTES
    return {
        "chunks": ((experts, *grid), torch.uint8),
        "row_scale": ((experts, rows), torch.float32),
    }


def empty_packed(experts: int, rows: int, columns: int, device: torch.device | str) -> Packed:
    """Packed weights [experts, rows, columns] to be written by `pack`."""
    shapes = packed_shapes(experts, rows, columns)
    with torch.inference_mode(False):  # rewritten inside and outside of it
        return Packed(*[torch.empty(s, dtype=d, device=device) for s, d in shapes.values()])


def _places(out: Packed, experts: Sequence[int] | None, codes: torch.Tensor) -> list[int]:
    """Where in `out` the experts of `codes` go. Raises ValueError unless they all fit."""
    check_dimensions("out.chunks", out.chunks, 5)
    num_experts, num_given = len(out.chunks), len(codes)
    places = list(range(num_experts)) if experts is None else [int(expert) for expert in experts]
    if len(places) != num_given:
        raise ValueError(f"codes has {num_given} experts, expected {len(places)}")
    if len(set(places)) != num_given or not all(0 <= place < num_experts for place in places):
        raise ValueError(f"experts={places} must be different ones of 0..{num_experts - 1}")
    shapes = packed_shapes(num_experts, codes.shape[1], 2 * codes.shape[2])
    for name, tensor in zip(Packed._fields, out, strict=True):
        shape, dtype = shapes[name]
        check_dimensions(f"out.{name}", tensor, len(shape))
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"out.{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}"
            )
        if tensor.device != codes.device:
            raise ValueError(f"out.{name} is on device {tensor.device}, codes on {codes.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"out.{name} with strides {list(tensor.stride())} is not contiguous")
        if tensor.data_ptr() % _ALIGNMENT:
            raise ValueError(
                f"out.{name} starts at {tensor.data_ptr():#x}, not a multiple of {_ALIGNMENT}"
            )
    return places


# ---------------------------------------------------------------- the same bytes in two orders
def _ordered(tensor: torch.Tensor, axes: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    return tensor.permute([axes.index(axis) for axis in wanted])


def _by_row(values_RC: torch.Tensor, order: str, columns: Sequence[str], wanted: Sequence[str]):
    """A view of rows and columns with named axes."""
    row_axes = _ROW_AXES[order]
    split = values_RC.unflatten(1, [_SIZES[axis] for axis in columns])
    split = split.unflatten(0, [_SIZES[axis] for axis in row_axes])
    return _ordered(split, [*row_axes, *columns], wanted)


_CHUNK_AXES = ("tile", "k_block", "warpgroup", "block")
_ROWS = ("warp_high", "warp_low", "g_high", "g_low")
_WORD_AXES = (*_CHUNK_AXES, "s_high", *_ROWS, "t", "s_low", "half")
_CODE_COLUMNS = ("k_block", "t", "s_high", "s_low", "khalf", "byte")
_SCALE_AXES = {
    torch.uint8: (*_CHUNK_AXES, *_ROWS, "t", "half"),
    torch.float32: (*_CHUNK_AXES, *_ROWS, "half"),
}


def _codes_by_row(codes_RB: torch.Tensor, order: str) -> torch.Tensor:
    """View of codes: [axes of words, khalf, byte], byte having b = 0, 1 or 2, 3."""
    return _by_row(codes_RB, order, _CODE_COLUMNS, (*_WORD_AXES, "khalf", "byte"))


def _scales_by_row(scales_RG: torch.Tensor, order: str) -> torch.Tensor:
    """View of scales: [axes of scales]."""
    axes = _SCALE_AXES[scales_RG.dtype]
    columns = [axis for axis in ("k_block", "t") if axis in axes]
    return _by_row(scales_RG, order, columns, axes)


def _words(chunks: torch.Tensor) -> torch.Tensor:
    """View of an expert's chunks: [axes of words, bytes of a word]."""
    own = chunks[..., :CODE_BYTES].unflatten(-1, [_SIZES[axis] for axis in _WORD_AXES[4:]] + [4])
    return own.unflatten(2, (2, 2))


def _scales(chunks: torch.Tensor, form: Format) -> torch.Tensor:
    """View of an expert's chunks as `_scales_by_row` has them."""
    own = chunks[..., CODE_BYTES:].view(form.scale_dtypes[0])
    sizes = [_SIZES[axis] for axis in _SCALE_AXES[own.dtype][4:]]
    return own.unflatten(-1, sizes).unflatten(2, (2, 2))


def _write_words(chunks: torch.Tensor, codes_RB: torch.Tensor, order: str) -> None:
    """Codes as sign and magnitude into an expert's chunks. Bytes of a word are as those of the
    checkpoint, khalf and byte, but for the signs.
    """
    codes = _codes_by_row(codes_RB, order).contiguous().flatten(-2)
    words = codes & _MAGNITUDES
    for b in range(4):
        of_khalf = codes[..., b // 2], codes[..., 2 + b // 2]
        if b % 2:
            words[..., b] |= (of_khalf[0] & 0x80) | ((of_khalf[1] >> 4) & 0x08)
        else:
            words[..., b] |= ((of_khalf[0] << 4) & 0x80) | (of_khalf[1] & 0x08)
    _words(chunks).copy_(words)


def _read_words(chunks: torch.Tensor, codes_RB: torch.Tensor, order: str) -> None:
    """What `_write_words` wrote, into codes."""
    words = _words(chunks).contiguous()
    codes = words & _MAGNITUDES
    for byte in range(2):
        even, odd = words[..., 2 * byte], words[..., 2 * byte + 1]
        codes[..., byte] |= ((even >> 4) & 0x08) | (odd & 0x80)
        codes[..., 2 + byte] |= (even & 0x08) | ((odd << 4) & 0x80)
    _codes_by_row(codes_RB, order).copy_(codes.unflatten(-1, (2, 2)))


def _padded(values_NC: torch.Tensor) -> torch.Tensor:
    """With rows of zeros up to a whole tile."""
    rows = values_NC.shape[0]
    missing = _num_tiles(rows) * TILE_ROWS - rows
    return torch.nn.functional.pad(values_NC, (0, 0, 0, missing)) if missing else values_NC


# ---------------------------------------------------------------- what the table cannot hold
def _sign_and_magnitude(codes_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes with sign and magnitude, those that had -8) of two codes of INT4 per byte: the second
    is a byte with bit 3 or 7 set. -8 becomes -7.
    """
    negative = (codes_NB >> 3) & 0x11
    magnitude = ((codes_NB & _MAGNITUDES) ^ (negative * 7)) + negative
    eights = magnitude & _SIGNS
    return (magnitude - (eights >> 3)) | (negative << 3), eights


def _two_complement(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of `_sign_and_magnitude`, which leaves no -0."""
    negative = (codes >> 3) & 0x11
    return (((codes & _MAGNITUDES) ^ (negative * 7)) + negative) | (negative << 3)


def _shift_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, whether a value changed) by 256 * shift + byte: two codes of MXFP4 times
    2 ** -shift, rounded to the grid.
    """
    pairs = MXFP4.pairs(device).unsqueeze(0)
    factors = 2.0 ** -torch.arange(_MAX_SHIFT + 1, device=device).view(-1, 1, 1)
    codes = round_to_e2m1(pairs * factors)
    values = torch.tensor(MXFP4.values, device=device)[codes.long()]
    return join_nibbles(codes).flatten(), (values != pairs * factors).any(dim=-1).flatten()


def _rebased(
    codes_NB: torch.Tensor, exponents_NG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(codes, exponents relative to the row's less MIN_EXPONENT, row scales, groups whose values
    changed) of MXFP4.
    """
    rows, num_groups = exponents_NG.shape
    groups = codes_NB.view(rows, num_groups, -1)
    has_values = (groups & _MAGNITUDES).amax(dim=-1) > 0
    exponents = exponents_NG.int()
    top = torch.where(has_values, exponents, 0).amax(dim=1)
    base = (top - MAX_EXPONENT).clamp_min(1)  # so that its power of two is a normal number
    relative = exponents - base.unsqueeze(1)
    num_changed = 0
    low = (has_values & (relative < MIN_EXPONENT)).nonzero(as_tuple=True)
    if len(low[0]):
        table, changes = _shift_tables(codes_NB.device)
        shift = (MIN_EXPONENT - relative[low]).clamp_max(_MAX_SHIFT)
        index = (256 * shift).unsqueeze(1) + groups[low].int()
        num_changed = int(changes[index].any(dim=1).sum())
        groups = groups.clone()
        groups[low] = table[index]
    stored = relative.clamp(MIN_EXPONENT, MAX_EXPONENT) - MIN_EXPONENT
    row_scale = (base << 23).view(torch.float32)
    return groups.view(codes_NB.shape), stored.to(torch.uint8), row_scale, num_changed


# ---------------------------------------------------------------- for users
def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    order: str,
    out: Packed | None = None,
    experts: Sequence[int] | None = None,
) -> tuple[Packed, int]:
    """(packed weights, how many groups have values that changed) of weights in checkpoint layout.

    codes: uint8 [e, N, K/2]; scales: uint8 or float8_e8m0fnu [e, N, K/32] of MXFP4, or bfloat16 or
    float32 [e, N, K/128] of INT4 (see `fourbit`). order: GATE_UP for w13 [e, 2I, H], DOWN for w2
    [e, H, I]; I and H are multiples of 128. out: written in place and returned, all of its experts,
    or those numbered `experts` with the weights given in that order; nothing is written if an
    argument is refused. Peak memory beside the result is some copies of one expert.

    MXFP4 is exact in rows whose exponents differ by up to 11; groups that are lower are rounded to
    the lowest exponent that the row has, and counted if that changed a value. Groups of zeros do
    not count. INT4's -8 becomes -7, and groups that hold it are counted. Raises ValueError, naming
    the argument, as `check_checkpoint` does, for N that does not fit the order, for an `out` of
    another shape, dtype or device or that is not contiguous and aligned to 16 bytes, and for
    `experts` that are not in it.
    """
    _check_order(order)
    form, scales = check_checkpoint(codes, scales)
    num_experts, rows = codes.shape[:2]
    if rows % _ROW_MULTIPLE[order]:
        raise ValueError(
            f"codes has shape {list(codes.shape)}: N={rows} is no multiple of "
            f"{_ROW_MULTIPLE[order]}, as order={order!r} needs"
        )
    if out is None:
        if experts is not None:
            raise ValueError(f"experts={experts!r} is given without out")
        out = empty_packed(num_experts, rows, 2 * codes.shape[2], codes.device)
    num_changed = 0
    for given, place in enumerate(_places(out, experts, codes)):
        own, own_scales = codes[given].contiguous(), scales[given]
        if form is MXFP4:
            own, own_scales, row_scale, changed = _rebased(own, own_scales)
            out.row_scale[place] = row_scale
        else:
            own, eights = _sign_and_magnitude(own)
            changed = int((eights.view(*own_scales.shape, -1).amax(dim=-1) > 0).sum())
            out.row_scale[place] = 1.0
        num_changed += changed
        _write_words(out.chunks[place], _padded(own), order)
        by_row = _scales_by_row(_padded(own_scales.contiguous()), order)
        _scales(out.chunks[place], form).copy_(by_row)
    return out, num_changed


def unpack(packed: Packed, order: str, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) in checkpoint layout: the inverse of `pack`, of format "mxfp4" or "int4".

    Bit for bit what was packed, -0 included, but for: groups whose exponent is over 11 below their
    row's highest, which have the codes and the exponent that they were rounded to; groups of zeros
    that were out of that range at either end, whose exponent is the nearest within; and -8, which
    is -7. Scales of INT4 are float32 (those of bfloat16 convert back exactly). Raises ValueError,
    naming the argument, for what `pack` cannot have made.
    """
    _check_order(order)
    if form not in FORMATS:
        raise ValueError(f"form={form!r} is not one of {sorted(FORMATS)}")
    check_dimensions("packed.chunks", packed.chunks, 5)
    check_dimensions("packed.row_scale", packed.row_scale, 2)
    experts, rows = packed.row_scale.shape
    columns = packed.chunks.shape[2] * CHUNK_COLUMNS
    for name, tensor in zip(Packed._fields, packed, strict=True):
        shape, dtype = packed_shapes(experts, rows, columns)[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"packed.{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} "
                f"{dtype}"
            )
    if rows % _ROW_MULTIPLE[order]:
        raise ValueError(
            f"packed.row_scale has shape {[experts, rows]}: {rows} is no multiple of "
            f"{_ROW_MULTIPLE[order]}, as order={order!r} needs"
        )
    row_format = FORMATS[form]
    groups = columns // row_format.group
    codes = packed.chunks.new_empty(experts, rows, columns // 2)
    scales = codes.new_empty(experts, rows, groups, dtype=row_format.scale_dtypes[0])
    padded_rows = _num_tiles(rows) * TILE_ROWS
    own = codes.new_empty(padded_rows, columns // 2)
    own_scales = scales.new_empty(padded_rows, groups)
    for expert in range(experts):
        chunks = packed.chunks[expert]
        _read_words(chunks, own, order)
        _scales_by_row(own_scales, order).copy_(_scales(chunks, row_format))
        if row_format is INT4:
            codes[expert], scales[expert] = _two_complement(own[:rows]), own_scales[:rows]
            continue
        base = packed.row_scale[expert].view(torch.int32) >> 23
        lifted = own_scales[:rows].int() + (base + MIN_EXPONENT).unsqueeze(1)
        codes[expert], scales[expert] = own[:rows], lifted.clamp(0, 2 * EXPONENT_BIAS)
    return codes, scales
