"""Quantised weights, the layout of their scales, and refusals of weights that do not fit."""

from __future__ import annotations

import pytest
import torch

from megamoe import quantize_weights
from megamoe.config import MoEConfig, select
from megamoe.launch_shape import LaunchShape
from megamoe.precision import PRECISIONS
from megamoe.reference import Weights, relative_error
from megamoe.regions import layout_of
from megamoe.weights import (
    check_tensor,
    check_weights,
    empty_tile_scales,
    empty_weights,
    pack_weights,
    unpack_weights,
    write_tile_scales,
)

CPU = torch.device("cpu")
PACKED = [name for name, recipe in PRECISIONS.items() if recipe.weights.packed]
FP8 = torch.float8_e4m3fn
FP8_RECIPES = ("fp8_block", "fp8_channel")


def config_of(precision, hidden=384, intermediate=256):
    return MoEConfig(8, 2, hidden, intermediate, 16, 2, precision)


def drawn(experts=3, hidden=384, intermediate=256):
    rng = torch.Generator().manual_seed(hidden)
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=rng) / hidden**0.5
    w2 = torch.randn(experts, hidden, intermediate, generator=rng) / intermediate**0.5
    return w13.bfloat16(), w2.bfloat16()


# --- quantising


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_a_block_of_128_by_128_weights_shares_a_scale(name):
    plain = Weights(*drawn())
    made = quantize_weights(*plain[:2], "fp8_block")
    matrix, stored = getattr(plain, name).float(), getattr(made, name)
    scale = getattr(made, f"{name}_scale")
    experts, rows, columns = matrix.shape
    assert scale.shape == (experts, rows // 128, columns // 128) and scale.dtype == torch.float32
    for expert in range(experts):
        for i in range(rows // 128):
            for j in range(columns // 128):
                part = expert, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                expected = matrix[part].abs().max() / torch.tensor(448.0)
                assert scale[expert, i, j] == expected
                inverse = torch.ones(()) / expected
                want = (matrix[part] * inverse).to(torch.float8_e4m3fn)
                assert torch.equal(stored[part].view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_an_output_channel_shares_a_scale(name):
    plain = Weights(*drawn())
    made = quantize_weights(*plain[:2], "fp8_channel")
    matrix, scale = getattr(plain, name).float(), getattr(made, f"{name}_scale")
    assert torch.equal(scale, matrix.abs().amax(-1) / torch.tensor(448.0))
    inverse = torch.ones(()) / scale.unsqueeze(-1)
    want = (matrix * inverse).to(torch.float8_e4m3fn)
    assert torch.equal(getattr(made, name).view(torch.uint8), want.view(torch.uint8))
    back = getattr(made, name).float() * scale.unsqueeze(-1)
    assert 0.01 < relative_error(back, matrix) < 0.04


@pytest.mark.parametrize("precision", FP8_RECIPES)
def test_quantised_weights_are_what_the_layer_takes(precision):
    config = config_of(precision)
    made = quantize_weights(*drawn(4), precision)
    check_weights(config, 4, CPU, made)
    blank = empty_weights(config.recipe, 4, 384, 256, CPU)
    for one, other in zip(made, blank, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
    second = made.of(slice(2, 4))
    assert torch.equal(second.w13_scale, made.w13_scale[2:])
    assert second.of(1).w2.data_ptr() == made.w2[3].data_ptr()


@pytest.mark.parametrize(
    "w13,w2,precision,message",
    [
        (*drawn(), "bf16", "precision='bf16' has no scales"),
        (*drawn(), "fp3", "precision='fp3' is not supported"),
        (drawn()[0][:, :-1], drawn()[1], "fp8_block", r"w13 has shape \[3, 511, 384\]"),
        (*drawn(1, 64, 128), "fp8_block", r"w2 has shape \[1, 64, 128\]"),
        (drawn()[0][0], drawn()[1], "fp8_block", r"w13 has shape \[512, 384\], .* 3 dimensions"),
        (drawn()[0], drawn()[1][0], "fp8_block", r"w2 has shape \[384, 256\], .* 3 dimensions"),
        (None, drawn()[1], "fp8_channel", "w13 must be a torch.Tensor, got NoneType"),
        (drawn()[0], [1.0], "fp8_channel", "w2 must be a torch.Tensor, got list"),
        (drawn()[0].int(), drawn()[1], "fp8_block", "w13 has dtype torch.int32, expected a float"),
        (drawn()[0], drawn()[1].bool(), "fp8_block", "w2 has dtype torch.bool, expected a float"),
        (drawn()[0].to(FP8), drawn()[1], "fp8_block", "w13 has dtype torch.float8_e4m3fn: its sca"),
        (drawn()[0], drawn()[1].to(torch.float8_e5m2), "fp8_channel", "w2 has dtype torch.float8_"),
        (*drawn(), [], r"precision=\[\] must be a string"),
        (*drawn(), None, "precision=None must be a string"),
    ],
)
def test_what_cannot_be_quantised(w13, w2, precision, message):
    with pytest.raises(ValueError, match=message):
        quantize_weights(w13, w2, precision)


@pytest.mark.parametrize("precision", PACKED)
def test_packed_weights_come_back(precision):
    operand, given = PRECISIONS[precision].weights, quantize_weights(*drawn(2), precision)
    config = config_of(precision)
    check_weights(config, 2, CPU, given)
    held, changed = pack_weights(given)
    check_weights(config, 2, CPU, held, resident=True)
    assert changed == 0
    for one, other in zip(unpack_weights(held, operand), given, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("precision", PACKED)
def test_no_matrix_is_packed_if_scales_of_the_other_are_refused(precision):
    held, _ = pack_weights(quantize_weights(*drawn(2), precision))
    before = [tensor.clone() for tensor in held]
    w13, w2 = drawn(2)
    other = quantize_weights(2 * w13, 2 * w2, precision)
    other.w2_scale[1, 3, 0] = 255 if other.w2_scale.dtype == torch.uint8 else float("nan")
    with pytest.raises(ValueError, match="w2_scale has .* at expert 1, row 3, group"):
        pack_weights(other, held)
    assert all(torch.equal(one, kept) for one, kept in zip(held, before, strict=True))


@pytest.mark.parametrize("precision", FP8_RECIPES)
def test_quantised_parameters_need_no_grad(precision):
    plain = drawn()
    made = quantize_weights(*map(torch.nn.Parameter, plain), precision)
    assert not any(tensor.requires_grad for tensor in made)
    for one, other in zip(made, quantize_weights(*plain, precision), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# --- scales as the kernel reads them


@pytest.mark.parametrize("hidden,intermediate", [(128, 128), (384, 256), (512, 384)])
def test_scales_of_a_tile_lie_side_by_side(hidden, intermediate):
    """Per quarter of a tile's columns: gate, up, gate, up for FC1; two row blocks for FC2."""
    config = config_of("fp8_block", hidden, intermediate)
    kernel = select(config)
    shape = LaunchShape(config, kernel, layout_of(config, kernel))
    made = quantize_weights(*drawn(4, hidden, intermediate), "fp8_block")
    w13_tile_scales, w2_tile_scales = empty_tile_scales(config, 4, torch.device("cpu"))
    for _ in range(2):  # in place, over what was there
        write_tile_scales(made, w13_tile_scales, w2_tile_scales)
    assert w13_tile_scales.shape == (4, shape.fc1_columns, hidden // 128, 4)
    assert w2_tile_scales.shape == (4, shape.fc2_columns, intermediate // 128, 4)
    for scales in (w13_tile_scales, w2_tile_scales):
        assert scales.dtype == torch.float32 and scales.is_contiguous()
    for expert in range(4):
        for column in range(shape.fc1_columns):
            for k in range(hidden // 128):
                gate = made.w13_scale[expert, column, k]
                up = made.w13_scale[expert, intermediate // 128 + column, k]
                assert w13_tile_scales[expert, column, k].tolist() == [gate, up, gate, up]
        for column in range(shape.fc2_columns):
            for k in range(intermediate // 128):
                rows = [made.w2_scale[expert, 2 * column, k], torch.zeros(())]
                if 2 * column + 1 < hidden // 128:
                    rows[1] = made.w2_scale[expert, 2 * column + 1, k]
                assert w2_tile_scales[expert, column, k].tolist() == [
                    rows[0],
                    rows[0],
                    rows[1],
                    rows[1],
                ]


@pytest.mark.parametrize("precision", ["bf16", "fp8_channel"])
def test_only_scales_of_blocks_are_laid_out_anew(precision):
    assert empty_tile_scales(config_of(precision), 4, torch.device("cpu")) is None


# --- refusals


def broken(precision, **changes):
    """Weights of four experts with some of their tensors replaced."""
    made = Weights(*drawn(4))
    if PRECISIONS[precision].weights.has_scales:
        made = quantize_weights(*drawn(4), precision)
    return made._replace(**{name: change(made) for name, change in changes.items()})


def unaligned(tensor):
    """The same values, four bytes past an aligned address."""
    raw = torch.empty(tensor.numel() * tensor.element_size() + 4, dtype=torch.uint8)
    view = raw[4:].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


@pytest.mark.parametrize(
    "precision,changes,words",
    [
        ("bf16", {"w13": lambda w: drawn(8)[0]}, ["w13", "[8, 512, 384]", "[4, 512, 384]"]),
        ("bf16", {"w13": lambda w: drawn(4, 128)[0]}, ["w13", "[4, 512, 128]"]),
        ("bf16", {"w13": lambda w: w.w13.float()}, ["w13", "float32", "bfloat16"]),
        ("bf16", {"w13": lambda w: None}, ["w13", "NoneType"]),
        ("bf16", {"w2": lambda w: w.w2.float()}, ["w2", "float32", "bfloat16"]),
        ("bf16", {"w2": lambda w: w.w2.mT}, ["w2", "[4, 256, 384]", "[4, 384, 256]"]),
        ("bf16", {"w2": lambda w: w.w2.mT.contiguous().mT}, ["w2", "not contiguous"]),
        ("bf16", {"w2": lambda w: w.w2[:3]}, ["w2", "[3, 384, 256]"]),
        ("bf16", {"w2": lambda w: [1.0]}, ["w2", "list"]),
        ("bf16", {"w13_scale": lambda w: torch.ones(4)}, ["w13_scale is given", "'bf16'"]),
        ("bf16", {"w2_scale": lambda w: torch.ones(4)}, ["w2_scale is given", "'bf16'"]),
        ("bf16", {"w2": lambda w: unaligned(w.w2)}, ["w2 starts at address", "multiple of 16"]),
        ("fp8_block", {"w13_scale": lambda w: None}, ["w13_scale is missing", "[4, 4, 3]"]),
        ("fp8_channel", {"w2_scale": lambda w: None}, ["w2_scale is missing", "[4, 384]"]),
        ("fp8_block", {"w2_scale": lambda w: w.w2_scale.mT}, ["w2_scale", "[4, 2, 3]"]),
        ("fp8_block", {"w2_scale": lambda w: w.w2_scale.bfloat16()}, ["w2_scale", "bfloat16"]),
        ("fp8_block", {"w13": lambda w: w.w13.half()}, ["w13", "float16", "float8_e4m3fn"]),
        ("fp8_channel", {"w13_scale": lambda w: unaligned(w.w13_scale)}, ["w13_scale starts"]),
        (
            "fp8_block",
            {"w13": lambda w: drawn(4)[0]},
            ["w13 has dtype torch.bfloat16", "quantize_weights(w13, w2, 'fp8_block')"],
        ),
        (
            "fp8_channel",
            {"w2": lambda w: drawn(4)[1]},
            ["w2 has dtype torch.bfloat16", "quantize_weights(w13, w2, 'fp8_channel')"],
        ),
    ],
)
def test_bad_weights_are_named(precision, changes, words):
    with pytest.raises(ValueError) as error:
        check_weights(config_of(precision), 4, CPU, broken(precision, **changes))
    for word in words:
        assert word in str(error.value)


def test_scales_of_blocks_are_laid_out_anew_wherever_they_start():
    made = broken("fp8_block", w13_scale=lambda w: unaligned(w.w13_scale))
    check_weights(config_of("fp8_block"), 4, CPU, made)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_good_weights_pass(precision):
    check_weights(config_of(precision), 4, CPU, broken(precision))


@pytest.mark.parametrize(
    "tensor,words",
    [
        (torch.zeros(2, 3, dtype=torch.int32), ["int32", "int64"]),
        (torch.zeros(3, 2, dtype=torch.int64), ["[3, 2]", "[2, 3]"]),
        (torch.zeros(6, dtype=torch.int64), ["[6]", "[2, 3]"]),
        (torch.zeros(3, 2, dtype=torch.int64).T, ["[1, 2]", "contiguous"]),
        (torch.zeros(2, 6, dtype=torch.int64)[:, ::2], ["[6, 2]", "contiguous"]),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), ["meta", "cpu"]),
        ([[0, 0, 0], [0, 0, 0]], ["list"]),
    ],
)
def test_bad_tensor_is_named(tensor, words):
    with pytest.raises(ValueError) as error:
        check_tensor("topk_idx", tensor, (2, 3), torch.int64, CPU)
    for word in ["topk_idx", *words]:
        assert word in str(error.value)


def shifted(count, dtype, by):
    """`count` items that start `by` bytes past a multiple of 16."""
    raw = bytearray(count * dtype.itemsize + 32)
    skip = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 16
    return torch.frombuffer(raw, dtype=dtype, count=count, offset=skip + by)


@pytest.mark.parametrize(
    "dtype,by,alignment,passes",
    [
        (torch.bfloat16, 2, 1, True),
        (torch.bfloat16, 2, 16, False),
        (torch.bfloat16, 16, 16, True),
        (torch.bfloat16, 1, 1, False),
        (torch.int64, 8, 1, True),
        (torch.int64, 4, 1, False),
        (torch.int32, 4, 1, True),
    ],
)
def test_an_address_is_a_multiple_of_the_alignment_and_of_the_items(dtype, by, alignment, passes):
    tensor = shifted(6, dtype, by)
    if passes:
        check_tensor("x", tensor, (6,), dtype, CPU, alignment)
    else:
        asked = max(alignment, dtype.itemsize)
        with pytest.raises(ValueError, match=f"x starts at address .* a multiple of {asked}"):
            check_tensor("x", tensor, (6,), dtype, CPU, alignment)
    check_tensor("x", tensor[:0], (0,), dtype, CPU, alignment)


def test_good_tensor_passes():
    check_tensor("topk_idx", torch.zeros(2, 3, dtype=torch.int64), (2, 3), torch.int64, CPU)
    check_tensor("x", torch.zeros(0, 3), (0, 3), torch.float32, CPU)
