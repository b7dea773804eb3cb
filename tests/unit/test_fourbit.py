"""4-bit weights: the formats of checkpoints, quantisers, and the kernel's layout, which is read
thread by thread here.
"""

from __future__ import annotations

import math

import pytest
import torch

from megamoe import fourbit, fourbit_pack, precision
from megamoe.backends import in_places
from megamoe.fourbit_layout import CHUNK_BYTES, E2M1, column_at, place_of
from megamoe.fourbit_pack import DOWN, GATE_UP, empty_packed, pack, unpack

FP8 = torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = (GATE_UP, DOWN)
#: (H, I): the smallest, with half a tile of down rows, and with several tiles and K blocks.
SIZES = [(128, 128), (384, 256)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def shape_of(order, hidden, intermediate, experts=2):
    return (
        (experts, 2 * intermediate, hidden) if order == GATE_UP else (experts, hidden, intermediate)
    )


def drawn_codes(shape, rng):
    experts, rows, columns = shape
    return torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=rng)


def drawn_mxfp4(shape, seed, low=115, high=127):
    """Codes and exponents low..high - 1, whose rows are then shifted by up to 4: 12 exponents are
    what a row may have.
    """
    rng = generator(seed)
    experts, rows, columns = shape
    exponents = torch.randint(low, high, (experts, rows, columns // 32), generator=rng)
    exponents += torch.randint(0, 5, (experts, rows, 1), generator=rng)
    return drawn_codes(shape, rng), exponents.to(torch.uint8)


def drawn_int4(shape, seed, dtype=torch.float32):
    """Codes -7..7."""
    rng = generator(seed)
    codes = drawn_codes(shape, rng)
    codes[(codes & 15) == 8] ^= 1
    codes[(codes >> 4) == 8] ^= 16
    scales = torch.randn(*shape[:2], shape[2] // 128, generator=rng)
    return codes, scales.to(dtype)


# --- the layout, thread by thread


def nibble(codes, row, column):
    return codes[row][column // 2] >> 4 * (column % 2) & 15


def mxfp4_value(codes, exponents, row, column):
    code = nibble(codes, row, column)
    return math.ldexp(
        -E2M1[code & 7] if code & 8 else E2M1[code], exponents[row][column // 32] - 127
    )


def int4_value(codes, scales, row, column):
    code = nibble(codes, row, column)
    return (code - 16 if code & 8 else code) * scales[row][column // 128]


def weight_row(order, tile, warpgroup, block, warp, half, g, rows):
    if order == DOWN:
        return 256 * tile + ((warpgroup * 4 + warp) * 2 + block) * 16 + half * 8 + g
    place = ((warpgroup * 4 + warp) * 8 + g) * 2 + block
    s, khalf, t, b = place // 32, place // 16 % 2, place // 4 % 4, place % 4
    return 128 * tile + 32 * t + 8 * s + 4 * khalf + b + half * (rows // 2)


def read_by_threads(chunk, is_mxfp4):
    """{(warp, half, g, column): what the thread that has it makes of it} of a chunk."""
    words = chunk[:4096].view(torch.int32).tolist()
    exponents, scales = chunk[4096:].tolist(), chunk[4096:].view(torch.float32).tolist()
    seen = {}
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        g, t = divmod(lane, 4)
        for s in range(4):
            for half in range(2):
                word = words[(s // 2) * 512 + thread * 4 + (s % 2) * 2 + half] & 0xFFFFFFFF
                if is_mxfp4:
                    exponent = exponents[((warp * 8 + g) * 4 + t) * 2 + half]
                    assert 0 <= exponent <= 11
                    table, factor = E2M1, 2.0 ** (exponent - 5)
                else:
                    table, factor = range(8), scales[(warp * 8 + g) * 2 + half]
                for khalf in range(2):
                    for b in range(4):
                        value = table[word >> (16 * khalf + 4 * b) & 7] * factor
                        sign = word >> (8 * b + (3 if khalf else 7)) & 1
                        place = warp, half, g, 32 * t + 8 * s + 4 * khalf + b
                        assert place not in seen
                        seen[place] = -value if sign else value
    assert len(seen) == 64 * 128
    return seen


def assert_threads_see(packed, codes, scales, order, is_mxfp4):
    experts, rows, columns = *codes.shape[:2], 2 * codes.shape[2]
    assert packed.chunks.shape == (experts, -(-rows // 256), columns // 128, 4, 4096 + 256)
    value_of = mxfp4_value if is_mxfp4 else int4_value
    codes, scales, row_scale = codes.tolist(), scales.tolist(), packed.row_scale.tolist()
    for expert in range(experts):
        found = set()
        for tile, k_blocks in enumerate(packed.chunks[expert]):
            for k_block, chunks in enumerate(k_blocks):
                for number, chunk in enumerate(chunks):
                    seen = read_by_threads(chunk, is_mxfp4)
                    for (warp, half, g, column), value in seen.items():
                        place = tile, number // 2, number % 2, warp, half, g
                        row, column = weight_row(order, *place, rows), 128 * k_block + column
                        if row >= rows:
                            assert value == 0
                            continue
                        found.add((row, column))
                        want = value_of(codes[expert], scales[expert], row, column)
                        assert value * row_scale[expert][row] == want, (expert, row, column)
        assert len(found) == rows * columns


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hidden,intermediate", SIZES)
def test_threads_find_mxfp4_weights(order, hidden, intermediate):
    codes, exponents = drawn_mxfp4(shape_of(order, hidden, intermediate), hidden)
    packed, changed = pack(codes, exponents, order)
    assert changed == 0
    assert_threads_see(packed, codes, exponents, order, True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hidden,intermediate", SIZES)
def test_threads_find_int4_weights(order, hidden, intermediate):
    codes, scales = drawn_int4(shape_of(order, hidden, intermediate), hidden)
    packed, changed = pack(codes, scales, order)
    assert changed == 0 and bool((packed.row_scale == 1).all())
    assert_threads_see(packed, codes, scales, order, False)


def test_places_of_columns():
    """As the tensor cores number what a thread holds; what is staged lies as what is quantised."""
    places = [place_of(column) for column in range(384)]
    assert sorted(places) == list(range(384)) and places[256:259] == [256, 257, 258]
    assert [column_at(place) for place in places] == list(range(384))
    assert (place_of(8), place_of(4), place_of(32), place_of(128 + 127)) == (32, 16, 4, 255)
    tokens = torch.arange(2 * 384).view(2, 384).remainder(251).to(torch.uint8)
    moved = in_places(tokens.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert torch.equal(moved[:, places], tokens)


def test_a_chunk_has_the_bytes_that_its_description_says():
    assert CHUNK_BYTES == 4352


# --- packing and back


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hidden,intermediate", [*SIZES, (128, 384), (640, 128)])
def test_mxfp4_comes_back_bit_for_bit(order, hidden, intermediate):
    shape = shape_of(order, hidden, intermediate, experts=3)
    codes, exponents = drawn_mxfp4(shape, intermediate)
    packed, changed = pack(codes, exponents.view(torch.float8_e8m0fnu), order)
    back = unpack(packed, order, "mxfp4")
    assert changed == 0
    assert torch.equal(back[0], codes) and torch.equal(back[1], exponents)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_comes_back_bit_for_bit(order, dtype):
    codes, scales = drawn_int4(shape_of(order, 384, 256), 7, dtype)
    back = unpack(pack(codes, scales, order)[0], order, "int4")
    assert torch.equal(back[0], codes) and torch.equal(back[1].to(dtype), scales)


@pytest.mark.parametrize("low,high", [(0, 12), (243, 255)])
def test_exponents_at_either_end_come_back(low, high):
    shape = shape_of(DOWN, 384, 256)
    rng = generator(low)
    codes = drawn_codes(shape, rng)
    exponents = torch.randint(low, high, (2, 384, 8), generator=rng).to(torch.uint8)
    exponents[:, 0], exponents[:, 1] = low, high - 1  # rows of one exponent: 0 and 254 among them
    packed, changed = pack(codes, exponents, DOWN)
    back = unpack(packed, DOWN, "mxfp4")
    assert changed == 0 and bool(torch.isfinite(packed.row_scale).all())
    assert bool((packed.row_scale >= torch.finfo(torch.float32).tiny).all())
    assert torch.equal(back[0], codes) and torch.equal(back[1], exponents)


def test_zeros_keep_their_signs_and_exponents_within_reach():
    codes = torch.zeros(1, 256, 64, dtype=torch.uint8)
    codes[0, 0, :16], codes[0, 0, 16:32] = 0x88, 0x21  # groups of -0; of .5 and 1; of 0
    exponents = torch.full((1, 256, 4), 120, dtype=torch.uint8)
    exponents[0, 0] = torch.tensor([119, 120, 90, 200])  # relative to 114: 5, 6, low, high
    packed, changed = pack(codes, exponents, GATE_UP)
    back = unpack(packed, GATE_UP, "mxfp4")
    assert changed == 0 and packed.row_scale[0, 0] == 2.0 ** (114 - 127)
    assert torch.equal(back[0], codes)
    assert back[1][0, 0].tolist() == [119, 120, 109, 120]
    assert back[1][0, 1:].unique().tolist() == [7]  # nothing but zeros: base 1
    assert torch.equal(fourbit.dequantize(*back), fourbit.dequantize(codes, exponents))


def nearest(value):
    """Code of the nearest magnitude, of two the even one."""
    return min(range(8), key=lambda code: (abs(E2M1[code] - value), code % 2))


@pytest.mark.parametrize("below", range(12, 19))
def test_groups_far_below_are_rounded_and_counted(below):
    """Every magnitude alone in a group, under a row that is `below` exponents higher."""
    codes = torch.zeros(1, 256, 64, dtype=torch.uint8)
    exponents = torch.full((1, 256, 4), 120, dtype=torch.uint8)
    exponents[0, 8:, 1] = 120 - 11
    exponents[0, :8, 1] = 120 - below
    codes[0, :, 0] = 0x77  # the group on top
    for magnitude in range(8):
        codes[0, magnitude, 16:32] = magnitude | (magnitude | 8) << 4
    packed, changed = pack(codes, exponents, GATE_UP)
    back_codes, back_exponents = unpack(packed, GATE_UP, "mxfp4")
    shift, expected = below - 11, 0
    for magnitude in range(8):
        rounded = nearest(E2M1[magnitude] / 2**shift)
        assert back_codes[0, magnitude, 16:32].unique().tolist() == [rounded | (rounded | 8) << 4]
        if magnitude:
            assert back_exponents[0, magnitude, 1] == 120 - 11
        expected += E2M1[rounded] * 2**shift != E2M1[magnitude]
    assert changed == expected
    assert torch.equal(back_codes[0, 8:], codes[0, 8:])
    assert torch.equal(back_codes[0, :, :16], codes[0, :, :16])
    assert torch.equal(back_exponents[0, 8:], exponents[0, 8:])


def test_rounded_groups_are_the_nearest_at_random():
    codes, exponents = drawn_mxfp4((1, 256, 256), 5, low=100, high=127)
    before = codes.clone()
    packed, changed = pack(codes, exponents, GATE_UP)
    assert torch.equal(codes, before), "the checkpoint's own codes were written"
    back = unpack(packed, GATE_UP, "mxfp4")
    given, got = (fourbit.dequantize(*pair).view(256, 8, 32) for pair in ((codes, exponents), back))
    assert changed == int((given != got).any(-1).sum()) > 256
    base = exponents[0].int().amax(1, keepdim=True) - 6
    step = torch.where(exponents[0].int() < base - 5, 2.0 ** (base - 5 - 127), 0)
    assert bool(((given - got).abs() <= step.unsqueeze(-1) / 4).all())


def test_minus_8_becomes_minus_7_and_its_groups_are_counted():
    codes, scales = drawn_int4((2, 256, 256), 3)
    held = codes.clone()
    for place, code in (((0, 3, 0), 0x08), ((0, 3, 63), 0x80), ((1, 5, 64), 0x88)):
        codes[place] = code
        held[place] = (code >> 3 & 0x11) * 9  # -7 is 9
    packed, changed = pack(codes, scales, GATE_UP)
    assert changed == 2
    assert torch.equal(unpack(packed, GATE_UP, "int4")[0], held)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("draw", [drawn_mxfp4, drawn_int4])
def test_some_experts_are_packed_again_in_place(order, draw):
    shape = shape_of(order, 384, 128, experts=4)
    out, _ = pack(*draw(shape, 1), order)
    before = [tensor.clone() for tensor in out]
    places = [tensor.data_ptr() for tensor in out]
    new = draw((2, *shape[1:]), 2)
    again, _ = pack(*new, order, out=out, experts=[3, 1])
    alone, _ = pack(*new, order)
    assert [tensor.data_ptr() for tensor in again] == places
    for tensor, old, own in zip(again, before, alone, strict=True):
        assert torch.equal(tensor[[3, 1]], own)
        assert torch.equal(tensor[[0, 2]], old[[0, 2]])
    whole = draw(shape, 3)
    pack(*whole, order, out=out)
    for tensor, own in zip(out, pack(*whole, order)[0], strict=True):
        assert torch.equal(tensor, own)


def test_strided_weights_are_packed_like_their_copies():
    codes, exponents = drawn_mxfp4((4, 256, 256), 9)
    got, _ = pack(codes[::2], exponents[::2], DOWN)
    want, _ = pack(codes[::2].clone(), exponents[::2].clone(), DOWN)
    narrow, _ = pack(codes[:, :, :64], exponents[:, :, :4], DOWN)
    want_narrow, _ = pack(codes[:, :, :64].clone(), exponents[:, :, :4].clone(), DOWN)
    assert torch.equal(got.chunks, want.chunks)
    assert torch.equal(narrow.chunks, want_narrow.chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("draw", [drawn_mxfp4, drawn_int4])
def test_a_gpu_packs_the_same_bytes(draw, cuda):
    args = draw((2, 384, 256), 4) if draw is drawn_int4 else draw((2, 384, 256), 4, 100, 127)
    got, changed = pack(*(tensor.to(cuda) for tensor in args), DOWN)
    want, expected = pack(*args, DOWN)
    assert changed == expected
    for tensor, own in zip(got, want, strict=True):
        assert torch.equal(tensor.cpu(), own)


# --- values and quantisers


def test_every_byte_has_its_two_values():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 4, 64)
    exponents = torch.tensor([0, 126, 127, 200], dtype=torch.uint8).view(1, 4, 1).repeat(1, 1, 4)
    got = fourbit.dequantize(codes, exponents)
    assert got.dtype == torch.float32
    listed, powers = codes[0].tolist(), exponents[0].tolist()
    for row in range(4):
        for column in range(128):
            assert got[0, row, column] == mxfp4_value(listed, powers, row, column)
    scales = torch.tensor([0.5, -3.0, 1e-3, 7.0]).view(1, 4, 1)
    got = fourbit.dequantize(codes, scales)
    for row in range(4):
        for column in range(128):
            product = nibble(listed, row, column)
            product = (product - 16 if product & 8 else product) * scales[0, row, 0]
            assert got[0, row, column] == product


def test_rounding_to_e2m1_is_to_the_nearest_and_even():
    """Against brute force, on all ties, beside them and past the end."""
    sixteenths = torch.arange(0, 8 * 16 + 1) / 16
    beside = [torch.nextafter(sixteenths, torch.tensor(end)) for end in (-math.inf, math.inf)]
    values = torch.cat([sixteenths, *beside, torch.tensor([1e3, 1e-40])]).abs()
    got = fourbit.round_to_e2m1(values)
    assert got.tolist() == [nearest(value) for value in values.tolist()]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fourbit.round_to_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert torch.equal(fourbit.round_to_e2m1(-values), got | 8)


def codes_of(packed_nibbles):
    return torch.stack([packed_nibbles & 15, packed_nibbles >> 4], dim=-1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-38, 1e-42, 1e36])
def test_quantize_mxfp4_follows_the_ocp_rule(dtype, size):
    weights = (torch.randn(2, 4, 128, generator=generator(1)) * size).to(dtype)
    weights[0, 0, :32], weights[0, 1, 32:64] = 0, -0.0
    codes, exponents = fourbit.quantize_mxfp4(weights)
    assert codes.shape == (2, 4, 64) and exponents.shape == (2, 4, 4)
    got = codes_of(codes).tolist()
    for expert in range(2):
        for row in range(4):
            for group in range(4):
                columns = range(32 * group, 32 * group + 32)
                values = weights[expert, row].tolist()
                amax = max(abs(values[column]) for column in columns)
                power = max(math.frexp(amax)[1] - 1 - 2, -127) if amax else -127
                assert exponents[expert, row, group] == power + 127
                for column in columns:
                    code = nearest(abs(values[column]) / 2.0**power)
                    sign = math.copysign(1, values[column]) < 0
                    assert got[expert][row][column] == code + 8 * sign


def test_mxfp4_weights_are_quantised_to_themselves():
    codes, exponents = drawn_mxfp4((2, 128, 256), 8)
    codes[:, :, ::16] = 0x7E  # a group has -4 or 6, as quantised ones have
    values = fourbit.dequantize(codes, exponents)
    again = fourbit.quantize_mxfp4(values)
    assert torch.equal(again[0], codes) and torch.equal(again[1], exponents)


@pytest.mark.parametrize("columns", [128, 32])
def test_quantize_int4_is_to_the_nearest_and_even(columns):
    weights = torch.randn(2, 4, 256, generator=generator(2))
    steps = torch.arange(columns) % 29 / 2 - 7  # with all ties, and a scale of exactly 1
    weights[0, 0, :columns], weights[0, 1, :columns] = steps, 0
    codes, scales = fourbit.quantize_int4(weights, columns=columns)
    assert scales.shape == (2, 4, 256 // columns) and scales.dtype == torch.float32
    groups = weights.view(2, 4, -1, columns)
    want = groups.abs().amax(-1) / torch.tensor(7.0)
    assert torch.equal(scales, want)
    signed = codes_of(codes).view(groups.shape).int()
    signed = torch.where(signed >= 8, signed - 16, signed)
    assert signed[0, 0, 0].tolist() == [round(step) for step in steps.tolist()]
    assert int(signed.min()) == -7 and bool((signed[0, 1, 0] == 0).all())
    distance = (signed.double() * scales.unsqueeze(-1).double() - groups.double()).abs()
    assert bool((distance <= scales.unsqueeze(-1).double() * (0.5 + 1e-6)).all())


@pytest.mark.parametrize("quantize", [fourbit.quantize_mxfp4, fourbit.quantize_int4])
def test_weights_with_block_scales_are_multiplied_by_them_first(quantize):
    rng = generator(6)
    stored = torch.randn(2, 256, 384, generator=rng).to(FP8)
    scale = torch.rand(2, 2, 3, generator=rng) + 0.5
    by_value = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    got, want = quantize(stored, scale), quantize(stored.float() * by_value)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("operand", precision.PACKED)
def test_every_packed_operand_has_a_format(operand):
    form = fourbit.format_of(operand)
    assert form.operand is operand and form.group == operand.scale_columns
    assert form.scale_dtypes[0] is getattr(torch, operand.scale)
    weights = torch.randn(1, 2, 128, generator=generator(3))
    codes, scales = fourbit.QUANTIZERS[form.name](weights)
    assert fourbit.check_checkpoint(codes, scales)[0] is form
    assert scales.dtype is form.scale_dtypes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_kernel_multiplies_is_exact(dtype):
    """Integers, and their scales apart: a product of both is rounded."""
    codes, scales = drawn_int4((2, 4, 256), 5, dtype)
    codes[0, 0, 0] = 0x88
    values, of_sums = fourbit.multiplied(codes, scales)
    assert values.dtype == of_sums.dtype == torch.float32
    assert torch.equal(of_sums.to(dtype), scales) and values[0, 0, 0] == -8
    assert torch.equal(values, fourbit.dequantize(codes, torch.ones_like(scales)))
    codes, exponents = drawn_mxfp4((2, 4, 256), 5)
    values, nothing = fourbit.multiplied(codes, exponents)
    assert nothing is None and torch.equal(values, fourbit.dequantize(codes, exponents))


# --- to FP8


def block_values(made):
    scale = made.scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    return made.stored.double() * scale


def exact_values(codes, exponents):
    one = torch.full_like(exponents, 127)
    power = torch.exp2(exponents.double() - 127).repeat_interleave(32, 2)
    return fourbit.dequantize(codes, one).double() * power


@pytest.mark.parametrize("low", [0, 100, 240])
def test_blocks_whose_exponents_differ_by_14_are_exact_in_fp8(low):
    rng = generator(low)
    codes = drawn_codes((2, 256, 384), rng)
    exponents = torch.randint(low, low + 15, (2, 256, 12), generator=rng).to(torch.uint8)
    made = fourbit.to_fp8_block(codes, exponents)
    assert made.num_inexact_blocks == 0
    assert made.stored.dtype == FP8 and made.scale.shape == (2, 2, 3)
    assert torch.equal(block_values(made), exact_values(codes, exponents))
    assert made.stored.float().abs().view(2, 2, 128, 3, 128).amax((2, 4)).unique().tolist() == [384]


def test_blocks_with_too_wide_a_spread_are_counted():
    codes = torch.full((1, 256, 128), 0x77, dtype=torch.uint8)
    exponents = torch.full((1, 256, 8), 100, dtype=torch.uint8)
    exponents[0, 3, 1] = 100 - 16  # 6 is 1.5 times a power of two: it is lost last
    codes[0, 3, 16] = 0x71  # .5 is below all that e4m3 has
    exponents[0, 200, 6] = 0  # in the last block
    exponents[0, 10, 7], codes[0, 10, 112:] = 250, 0x80  # zeros, whatever their exponent
    made = fourbit.to_fp8_block(codes, exponents)
    assert made.num_inexact_blocks == 2
    exact = block_values(made) == exact_values(codes, exponents)
    assert exact.view(2, 128, 2, 128).all(3).all(1).tolist() == [[False, True], [True, False]]
    assert bool(torch.isfinite(made.stored.float()).all())


def test_integers_are_exact_in_fp8_with_their_own_scales():
    codes, scales = drawn_int4((2, 128, 256), 4)
    codes[0, 0, 0] = 0x88
    stored, own = fourbit.to_fp8(codes, scales.bfloat16())
    assert stored.dtype == FP8 and torch.equal(own, scales.bfloat16().float())
    assert torch.equal(stored.float(), fourbit.dequantize(codes, torch.ones_like(scales)))
    codes, exponents = drawn_mxfp4((2, 128, 256), 4)
    made = fourbit.to_fp8_block(codes, exponents)
    stored, scale = fourbit.to_fp8(codes, exponents)
    assert torch.equal(stored.float(), made.stored.float()) and torch.equal(scale, made.scale)


def test_a_block_of_zeros_has_scale_1():
    codes = torch.full((1, 128, 64), 0x80, dtype=torch.uint8)
    made = fourbit.to_fp8_block(codes, torch.full((1, 128, 4), 254, dtype=torch.uint8))
    assert made.scale.tolist() == [[[1.0]]] and made.num_inexact_blocks == 0
    assert made.stored.view(torch.uint8).unique().tolist() == [0, 0x80]


# --- refusals


def valid(experts=2, rows=256, columns=256):
    return drawn_mxfp4((experts, rows, columns), 1)


@pytest.mark.parametrize("use", [fourbit.dequantize, fourbit.to_fp8_block,
                                 lambda *args: pack(*args, DOWN)])  # fmt: skip
def test_an_exponent_that_is_nan_is_refused_with_its_place(use):
    codes, exponents = valid()
    exponents[1, 17, 3] = 255
    for scales in (exponents, exponents.view(torch.float8_e8m0fnu)):
        with pytest.raises(ValueError, match=r"scales .*255.*expert 1, row 17, group 3"):
            use(codes, scales)


def test_nothing_is_written_when_a_scale_is_refused():
    out, _ = pack(*valid(), DOWN)
    before = out.chunks.clone()
    codes, exponents = drawn_mxfp4((2, 256, 256), 2)
    exponents[1, 0, 0] = 255
    with pytest.raises(ValueError, match="scales"):
        pack(codes, exponents, DOWN, out=out)
    assert torch.equal(out.chunks, before)


def test_a_scale_that_is_not_finite_is_refused_with_its_place():
    codes, scales = drawn_int4((2, 256, 256), 1)
    for value in (math.nan, math.inf):
        scales[1, 9, 1] = value
        with pytest.raises(ValueError, match="scales .*expert 1, row 9, group 1"):
            pack(codes, scales, DOWN)


@pytest.mark.parametrize("change,message", [
    (lambda c, s: (c.tolist(), s), "codes must be a torch.Tensor, got list"),
    (lambda c, s: (c, None), "scales must be a torch.Tensor, got NoneType"),
    (lambda c, s: (c[0], s), r"codes has shape \[256, 128\], expected 3"),
    (lambda c, s: (c, s[0]), r"scales has shape \[256, 8\], expected 3"),
    (lambda c, s: (c.view(torch.int8), s), "codes has dtype torch.int8"),
    (lambda c, s: (c, s.half()), "scales has dtype torch.float16"),
    (lambda c, s: (c, s.float()), r"scales .*expected \[2, 256, 2\] for int4"),
    (lambda c, s: (c, s[:, :, :4]), r"scales .*expected \[2, 256, 8\] for mxfp4"),
    (lambda c, s: (c, s[:1]), "scales .*expected"),
    (lambda c, s: (c[:, :, :48], s[:, :, :3]), "codes .*K=96"),
    (lambda c, s: (c[:, :128], s[:, :128]), "codes .*N=128 is no multiple of 256"),
    (lambda c, s: (c, s.to("meta")), "scales is on device meta"),
])  # fmt: skip
def test_pack_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        pack(*change(*valid()), GATE_UP)


@pytest.mark.parametrize("change,message", [
    (lambda o: {"experts": [0, 0]}, r"experts=\[0, 0\]"),
    (lambda o: {"experts": [0, 3]}, r"experts=\[0, 3\] .*0\.\.2"),
    (lambda o: {"experts": [-1, 0]}, r"experts=\[-1, 0\]"),
    (lambda o: {"experts": [0]}, "codes has 2 experts, expected 1"),
    (lambda o: {}, "codes has 2 experts, expected 3"),
    (lambda o: {"out": o._replace(chunks=o.chunks[:, :, :1])}, "out.chunks is"),
    (lambda o: {"out": o._replace(chunks=o.chunks.view(torch.int8))}, "out.chunks is"),
    (lambda o: {"out": o._replace(chunks=o.chunks.mT.contiguous().mT)}, "out.chunks with strides"),
    (lambda o: {"out": o._replace(row_scale=o.row_scale.double())}, "out.row_scale is"),
    (lambda o: {"out": o._replace(row_scale=o.row_scale[:, :128])}, "out.row_scale is"),
    (lambda o: {"out": o._replace(row_scale=None)}, "out.row_scale must be"),
    (lambda o: {"out": None}, "experts=.* is given without out"),
])  # fmt: skip
def test_pack_refuses_an_out_that_does_not_fit(change, message):
    out = empty_packed(3, 256, 256, "cpu")
    given = change(out)
    arguments = {"out": out, **({"experts": [0, 1]} if "out" in given else {}), **given}
    with pytest.raises(ValueError, match=message):
        pack(*valid(), GATE_UP, **arguments)


def test_an_out_that_is_not_aligned_is_refused():
    out = empty_packed(2, 256, 256, "cpu")
    shifted = torch.empty(out.chunks.numel() + 8, dtype=torch.uint8)[8:].view(out.chunks.shape)
    with pytest.raises(ValueError, match="out.chunks starts at"):
        pack(*valid(), GATE_UP, out=out._replace(chunks=shifted))


def test_unpack_refuses_what_pack_does_not_make():
    packed, _ = pack(*valid(), GATE_UP)
    with pytest.raises(ValueError, match="order='up'"):
        unpack(packed, "up", "mxfp4")
    with pytest.raises(ValueError, match="order='up'"):
        pack(*valid(), "up")
    with pytest.raises(ValueError, match="form='nf4'"):
        unpack(packed, GATE_UP, "nf4")
    with pytest.raises(ValueError, match="packed.chunks"):
        unpack(packed._replace(chunks=packed.chunks[..., :4096]), GATE_UP, "mxfp4")
    with pytest.raises(ValueError, match="packed.row_scale"):
        unpack(packed._replace(row_scale=packed.row_scale.double()), GATE_UP, "mxfp4")
    half, _ = pack(*valid(rows=128), DOWN)
    with pytest.raises(ValueError, match="packed.row_scale .*multiple of 256"):
        unpack(half, GATE_UP, "mxfp4")


@pytest.mark.parametrize("quantize", [fourbit.quantize_mxfp4, fourbit.quantize_int4])
def test_quantisers_refuse_what_does_not_fit(quantize):
    weights, scale = torch.randn(2, 256, 256), torch.ones(2, 2, 2)
    for args, message in (
        ((None,), "weights must be a torch.Tensor"),
        ((weights[0],), "weights has shape"),
        ((weights[:, :, :200],), "weights .*K=200"),
        ((weights.double(),), "weights has dtype torch.float64"),
        ((weights, scale), "scale is given"),
        ((weights.to(FP8),), "scale is missing"),
        ((weights.to(FP8), scale[0]), "scale has shape"),
        ((weights.to(FP8), scale[:1]), r"scale has shape .*expected \[2, 2, 2\]"),
        ((weights.to(FP8), scale.double()), "scale has dtype"),
        ((weights[:, :100].to(FP8), scale), "weights .*multiples of 128"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(*args)
    for value in (math.nan, math.inf):
        weights[1, 7, 200] = value
        with pytest.raises(ValueError, match="weights .*expert 1, row 7, group"):
            quantize(weights)


def test_other_refusals():
    for columns in (0, 3, -2):
        with pytest.raises(ValueError, match=f"columns={columns}"):
            fourbit.quantize_int4(torch.randn(1, 2, 128), columns=columns)
    with pytest.raises(ValueError, match="scales has dtype torch.float32, expected exponents"):
        fourbit.to_fp8_block(*drawn_int4((1, 128, 128), 1))
    with pytest.raises(ValueError, match="codes .*N=100"):
        fourbit.to_fp8_block(*valid(rows=100))


def test_the_tables_of_the_formats():
    assert fourbit.MXFP4.values[:8] == E2M1 and fourbit.MXFP4.values[9:] == tuple(
        -v for v in E2M1[1:]
    )
    assert math.copysign(1, fourbit.MXFP4.values[8]) == -1
    assert fourbit.INT4.values == tuple(code - 16 if code > 7 else code for code in range(16))
    powers = torch.arange(-149, 128, dtype=torch.int32)
    assert fourbit.exp2(powers).tolist() == [2.0**power for power in powers.tolist()]
    assert fourbit_pack._num_tiles(384) == 2
