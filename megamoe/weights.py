"""Expert weights: what the layer takes, quantising them, and the layout of their scales.

The kernel reads `w13` [e, 2I, H] (gate rows, then up rows) and `w2` [e, H, I] as checkpoints hold
them. Scales of weight blocks are laid out anew (`write_tile_scales`), so that a math warp finds
those of a tile side by side; scales of output channels are used as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamoe.config import MoEConfig
from megamoe.fourbit import QUANTIZERS, check_scales, format_of
from megamoe.fourbit_pack import (
    DOWN,
    GATE_UP,
    Packed,
    pack,
    packed_shapes,
    unpack,
)
from megamoe.precision import NO_SCALES, WHOLE_ROW, Operand, Precision, precision_of
from megamoe.reference import Weights, quantize

ALIGNMENT = 16  # bytes: what TMA and vector accesses of the kernel ask of an address


def _scale_shape(block: tuple[int, int], experts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the scales of [experts, rows, columns]; () without scales."""
    if block == NO_SCALES:
        return ()
    if block[1] == WHOLE_ROW:
        return experts, rows // block[0]
    return experts, rows // block[0], columns // block[1]


def weight_shapes(
    recipe: Precision, experts: int, hidden: int, intermediate: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every field of `Weights` that the recipe has."""
    matrices = {"w13": (experts, 2 * intermediate, hidden), "w2": (experts, hidden, intermediate)}
    storage = getattr(torch, recipe.weights.storage)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: ((*shape[:2], shape[2] * recipe.weights.bits // (8 * storage.itemsize)), storage)
        for name, shape in matrices.items()
    }
    if recipe.weights.has_scales:
        for name, shape in matrices.items():
            scales = _scale_shape(recipe.weights.scale_block, *shape)
            expected[f"{name}_scale"] = scales, getattr(torch, recipe.weights.scale)
    return expected


def resident_shapes(
    recipe: Precision, experts: int, hidden: int, intermediate: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """As `weight_shapes`, of what launches read: packed weights lie otherwise."""
    if not recipe.weights.packed:
        return weight_shapes(recipe, experts, hidden, intermediate)
    w13 = packed_shapes(experts, 2 * intermediate, hidden)
    w2 = packed_shapes(experts, hidden, intermediate)
    return {
        "w13": w13["chunks"], "w2": w2["chunks"],
        "w13_scale": w13["row_scale"], "w2_scale": w2["row_scale"],
    }  # fmt: skip


@torch.no_grad()
def pack_weights(
    weights: Weights, out: Weights | None = None, experts: Sequence[int] | None = None
) -> tuple[Weights, int]:
    """(4-bit weights as the kernel reads them, how many groups were rounded anew) of weights in
    checkpoint layout: w13 and w2 are chunks, their scales those of rows. See `fourbit_pack.pack`,
    also for `out` and `experts`. Raises ValueError for an exponent that is NaN or a scale that is
    not finite, in either matrix before one is written.
    """
    packed, changed = [], 0
    for name, scales in (("w13_scale", weights.w13_scale), ("w2_scale", weights.w2_scale)):
        assert scales is not None
        check_scales(name, scales)
    for order, name in ((GATE_UP, "w13"), (DOWN, "w2")):
        into = out and Packed(getattr(out, name), getattr(out, f"{name}_scale"))
        codes, scales = getattr(weights, name), getattr(weights, f"{name}_scale")
        matrix, count = pack(codes, scales, order, into, experts)
        packed.append(matrix)
        changed += count
    w13, w2 = packed
    return Weights(w13.chunks, w2.chunks, w13.row_scale, w2.row_scale), changed


@torch.no_grad()
def unpack_weights(weights: Weights, operand: Operand) -> Weights:
    """The checkpoint layout of what `pack_weights` has made of this operand."""
    assert weights.w13_scale is not None and weights.w2_scale is not None
    name = format_of(operand).name
    w13 = unpack(Packed(weights.w13, weights.w13_scale), GATE_UP, name)
    w2 = unpack(Packed(weights.w2, weights.w2_scale), DOWN, name)
    return Weights(w13[0], w2[0], w13[1], w2[1])


def empty_weights(
    recipe: Precision,
    experts: int,
    hidden: int,
    intermediate: int,
    device: torch.device | str,
    resident: bool = False,
) -> Weights:
    """Weights of the recipe to be filled in; `resident`: as launches read them."""
    shapes_of = resident_shapes if resident else weight_shapes
    shapes = shapes_of(recipe, experts, hidden, intermediate)
    return Weights(
        **{
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
        }
    )


def _quantize_matrix(
    weights_NC: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stored [N, C], scales [N/block, C/block], or [N] for a block of a whole row)."""
    if block[1] == WHOLE_ROW:
        stored, scale = quantize(weights_NC, WHOLE_ROW)
        return stored, scale[:, 0]
    rows, columns = weights_NC.shape
    grid = rows // block[0], block[0], columns // block[1], block[1]
    blocks = weights_NC.reshape(grid).transpose(1, 2)
    stored, scale = quantize(blocks.reshape(grid[0] * grid[2], -1), WHOLE_ROW)
    return stored.view(blocks.shape).transpose(1, 2).reshape(rows, columns), scale.view(grid[::2])


@torch.no_grad()
def quantize_weights(w13: torch.Tensor, w2: torch.Tensor, precision: str) -> Weights:
    """(w13, w2, w13_scale, w2_scale) of a recipe with scales, as `MegaMoE.load_weights` takes them.

    w13: [e, 2I, H], gate rows then up rows; w2: [e, H, I]; bfloat16 or another floating dtype of
    at least two bytes, on any device. A block of weights (128 x 128 or an output channel, see
    `Weights`) is stored as value / scale with scale = max |value| / 448. Codes of 4 bits lie two a
    byte: in MXFP4 32 columns of a row share a power of two (`fourbit.quantize_mxfp4`), in INT4 128
    columns a scale (`fourbit.quantize_int4`). One expert after the other, to spare memory. Nothing
    is recorded for autograd. Raises ValueError for a recipe without scales, for what is no tensor
    of such a dtype, and for shapes that do not fit each other or are no multiples of 128.
    """
    recipe = precision_of(precision)
    if not recipe.weights.has_scales:
        raise ValueError(f"precision={precision!r} has no scales: use the weights as they are")
    for name, matrix in (("w13", w13), ("w2", w2)):
        if not isinstance(matrix, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(matrix).__name__}")
        if matrix.dim() != 3:
            raise ValueError(f"{name} has shape {list(matrix.shape)}, expected 3 dimensions")
        if not matrix.is_floating_point():
            raise ValueError(f"{name} has dtype {matrix.dtype}, expected a floating dtype")
        if matrix.element_size() == 1:
            raise ValueError(
                f"{name} has dtype {matrix.dtype}: its scales would be lost; multiply by them first"
            )
    experts, hidden, intermediate = w2.shape
    if tuple(w13.shape) != (experts, 2 * intermediate, hidden):
        raise ValueError(
            f"w13 has shape {list(w13.shape)}, expected {[experts, 2 * intermediate, hidden]} "
            f"with w2 of shape {list(w2.shape)}"
        )
    if hidden % 128 or intermediate % 128:
        raise ValueError(f"w2 has shape {list(w2.shape)}: H and I must be multiples of 128")
    if recipe.weights.packed:
        quantize_4bit = QUANTIZERS[format_of(recipe.weights).name]
        (w13, w13_scale), (w2, w2_scale) = quantize_4bit(w13), quantize_4bit(w2)
        return Weights(w13, w2, w13_scale, w2_scale)
    weights = empty_weights(recipe, experts, hidden, intermediate, w13.device)
    for expert in range(experts):
        for source, name in ((w13, "w13"), (w2, "w2")):
            stored, scale = _quantize_matrix(source[expert], recipe.weights.scale_block)
            getattr(weights, name)[expert] = stored
            getattr(weights, f"{name}_scale")[expert] = scale
    return weights


def split_shared(
    w13: torch.Tensor, w2: torch.Tensor, intermediate_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A shared expert of S * I columns as S shared experts of I = `intermediate_size`, whose
    outputs add up to its own: ([S, 2I, H], [S, H, I]) of w13 [2 * S * I, H], gate rows then up
    rows, and w2 [H, S * I]. Any dtype; copies. Raises ValueError for shapes that do not fit.
    """
    hidden, columns = w2.shape
    if columns % intermediate_size or tuple(w13.shape) != (2 * columns, hidden):
        raise ValueError(
            f"w13 of shape {list(w13.shape)} and w2 of {list(w2.shape)} are no shared expert of a "
            f"multiple of intermediate_size={intermediate_size} columns"
        )
    gate_up = w13.view(2, -1, intermediate_size, hidden).transpose(0, 1)
    down = w2.view(hidden, -1, intermediate_size).transpose(0, 1)
    return gate_up.reshape(-1, 2 * intermediate_size, hidden), down.contiguous()


def empty_tile_scales(
    config: MoEConfig, experts: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(w13_tile_scales, w2_tile_scales), zeroed, for `write_tile_scales` of so many experts; None
    for a recipe without a scale per weight block.
    """
    if not config.recipe.weights.tile_scales:
        return None
    rows, columns = config.recipe.weights.scale_block
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes = (
        (experts, intermediate // rows, hidden // columns, 4),
        (experts, -(-hidden // (2 * rows)), intermediate // columns, 4),
    )
    with torch.inference_mode(False):  # rewritten inside and outside of it
        w13_tile_scales, w2_tile_scales = (
            torch.zeros(s, dtype=torch.float32, device=device) for s in shapes
        )
    return w13_tile_scales, w2_tile_scales


@torch.no_grad()
def write_tile_scales(
    weights: Weights, w13_tile_scales: torch.Tensor, w2_tile_scales: torch.Tensor
) -> None:
    """Scales per weight block as the kernel reads them, into tables [e, tile columns, K blocks, 4]:
    one per quarter of a tile's 256 columns. Writes in place and allocates nothing.

    FC1 tile column j: gate, up, gate, up of row blocks j and I/128 + j. FC2 tile column j: row
    blocks 2j, 2j, 2j + 1, 2j + 1; past H the tables keep their 0.
    """
    assert weights.w13_scale is not None and weights.w2_scale is not None
    gate, up = weights.w13_scale.chunk(2, dim=1)
    w13_tile_scales[..., 0::2] = gate.unsqueeze(-1)
    w13_tile_scales[..., 1::2] = up.unsqueeze(-1)
    for half in range(2):
        scales = weights.w2_scale[:, half::2]
        w2_tile_scales[:, : scales.shape[1], :, 2 * half : 2 * half + 2] = scales.unsqueeze(-1)


def check_weights(
    config: MoEConfig,
    num_local_experts: int,
    device: torch.device,
    weights: Weights,
    resident: bool = False,
) -> None:
    """Raise ValueError, naming the tensor, unless all have the checkpoint layout (or with
    `resident` that of the kernel), dtype and device, and those that the kernel reads where they are
    its alignment.
    """
    recipe, precision = config.recipe, config.precision
    shapes = resident_shapes if resident else weight_shapes
    expected = shapes(recipe, num_local_experts, config.hidden_size, config.intermediate_size)
    for name, tensor in zip(Weights._fields, weights, strict=True):
        if name not in expected:
            if tensor is not None:
                raise ValueError(f"{name} is given, but precision={precision!r} has no scales")
            continue
        shape, dtype = expected[name]
        if tensor is None and name.endswith("_scale"):
            raise ValueError(
                f"{name} is missing: precision={precision!r} needs {list(shape)} {dtype}"
            )
        quantized = recipe.weights.has_scales and dtype != torch.float32
        if quantized and isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, expected {dtype}; "
                f"megamoe.quantize_weights(w13, w2, {precision!r}) returns weights and scales"
            )
        read_as_it_is = dtype != torch.float32 or recipe.weights.scale_columns == WHOLE_ROW
        check_tensor(name, tensor, shape, dtype, device, ALIGNMENT if read_as_it_is else 1)


def address_of(
    tensor: object,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    alignment: int = 1,
) -> int | None:
    """Where `tensor` starts if it passes `check_tensor`, else None. In about a microsecond: every
    forward asks.
    """
    if not (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return None
    address = tensor.data_ptr()
    if address and not address % max(alignment, dtype.itemsize):
        return address
    return address if not tensor.numel() or device.type == "meta" else None


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    alignment: int = 1,
) -> None:
    """Raise ValueError, naming field and value, unless `tensor` has this shape, dtype and device,
    is contiguous and, if it holds anything, has memory of its own that starts at a multiple of
    `alignment` bytes and of its items.
    """
    if address_of(tensor, shape, dtype, device, alignment) is not None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device.type != device.type or (
        device.index is not None and tensor.device.index != device.index
    ):
        raise ValueError(f"{name} is on device {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} with strides {list(tensor.stride())} is not contiguous")
    if not tensor.data_ptr():
        raise ValueError(
            f"{name} has no memory of its own: its storage was freed, or it is a wrapper "
            f"({type(tensor).__name__}) around other tensors; pass the plain local tensor"
        )
    alignment = max(alignment, dtype.itemsize)
    if tensor.data_ptr() % alignment and tensor.numel():
        raise ValueError(
            f"{name} starts at address {tensor.data_ptr():#x}, not a multiple of {alignment}"
        )
