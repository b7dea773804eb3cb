"""4-bit weights in a layer: copied when they are loaded, given back as a checkpoint has them."""

from __future__ import annotations

import pytest
import torch

from megamoe import quantize_weights, reference
from megamoe.fourbit import format_of
from megamoe.precision import PRECISIONS
from tests.nights import one_packed
from tests.unit.layers import (
    PACKED,
    E,
    H,
    I,
    K,
    T,
    check,
    inputs,
    loaded,
    make,
    quantized,
    same,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MXFP4, MXFP4_TOKEN, INT4 = "fp8_mxfp4", "fp8_mxfp4_token", "fp8_int4"
FIELDS = reference.Weights._fields
BYTES = {"w13": (2 * I, H // 2), "w2": (H, I // 2)}
SCALES = ("w13_scale", "w2_scale")


@pytest.fixture(scope="module", params=one_packed(PACKED))
def precision(request) -> str:
    return request.param


def random_bytes(rng: torch.Generator, end: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, end, (E, *shape), dtype=torch.uint8, generator=rng)


def drawn_mxfp4(low: int = 110, spread: int = 11, seed: int = 3) -> reference.Weights:
    """Random codes, and exponents `low` .. `low + spread`; the first of each row is the highest."""
    rng = torch.Generator().manual_seed(seed)
    codes = [random_bytes(rng, 256, *shape) for shape in BYTES.values()]
    scales = [random_bytes(rng, spread + 1, r, n // 16) + low for r, n in BYTES.values()]
    for matrix, exponents in zip(codes, scales, strict=True):
        matrix[..., 0] |= 2  # not zero: a group of zeros has no exponent to keep
        exponents[..., 0] = low + spread
    return reference.Weights(*codes, *scales)


def drawn_int4(seed: int = 3) -> reference.Weights:
    """Random codes but -8, and scales of either sign."""
    rng = torch.Generator().manual_seed(seed)
    codes = [random_bytes(rng, 256, *shape) for shape in BYTES.values()]
    for matrix in codes:
        matrix[(matrix & 15) == 8] ^= 1
        matrix[(matrix >> 4) == 8] ^= 16
    scales = [torch.randn(E, r, n // 64, generator=rng) for r, n in BYTES.values()]
    return reference.Weights(*codes, *scales)


DRAWN = {MXFP4: drawn_mxfp4, MXFP4_TOKEN: drawn_mxfp4, INT4: drawn_int4}


def state_of(given: reference.Weights) -> dict[str, torch.Tensor]:
    return {name: getattr(given, name) for name in FIELDS}


def places(moe) -> list[int]:
    return [tensor.data_ptr() for _, tensor in moe.kernel_tensors()]


def bits(moe) -> list[torch.Tensor]:
    return [tensor.view(torch.uint8).clone() for _, tensor in moe.kernel_tensors()]


# --- loading


def test_a_layer_equals_the_oracle_and_needs_the_given_tensors_no_more(precision):
    arguments, given = inputs(), weights(precision)
    moe = make(precision=precision)
    moe.load_weights(*given)
    assert moe.requantized_groups == 0
    ys = [y.clone() for y in moe(*arguments)]
    check(ys, *arguments, precision)
    for tensor in given:
        tensor.fill_(255)
    assert same(moe(*arguments), ys)
    for tensor in given:
        tensor.untyped_storage().resize_(0)
    assert same(moe(*arguments), ys)


@pytest.mark.parametrize("captured", [False, True])
def test_loading_again_writes_into_the_same_place(precision, captured):
    arguments, moe = inputs(), loaded(precision)
    before, version = places(moe), moe.weights_version
    moe._captured = captured
    for seed, replace in ((2, False), (3, True), (4, False)):
        other = weights(precision, seed)
        with torch.inference_mode(seed == 3):
            moe.load_weights(*other, replace=replace)
        assert places(moe) == before and moe.weights_version == version
        assert moe._captured == captured
        check(moe(*arguments), *arguments, precision, given=other)


def test_tensors_of_the_kernel_that_go_elsewhere_are_read_unless_a_graph_was_captured(precision):
    arguments, moe = inputs(), loaded(precision)
    moe.w13 = moe.w13.clone()
    check(moe(*arguments), *arguments, precision)
    moe._captured = True
    moe.w2_scale = moe.w2_scale.clone()
    with pytest.raises(ValueError, match="other addresses"):
        moe(*arguments)


def test_they_are_a_copy_of_some_half_a_byte_each(precision):
    moe = loaded(precision)
    held = dict(moe.kernel_tensors())
    assert list(held) == list(FIELDS)
    assert not list(moe.parameters())
    of_chunks = sum(held[name].nbytes for name in ("w13", "w2"))
    assert of_chunks == E * 3 * H * I * 17 // 32
    assert held["w13_scale"].shape == (E, 2 * I) and held["w2_scale"].shape == (E, H)
    assert {held[name].dtype for name in SCALES} == {torch.float32}


def test_scales_may_have_another_dtype_of_the_format(precision):
    """Exponents torch's own, scales of integers that of the model."""
    given, moe = weights(precision), make(precision=precision)
    own, other = format_of(PRECISIONS[precision].weights).scale_dtypes
    to = torch.Tensor.view if own.itemsize == other.itemsize else torch.Tensor.to
    scales = [to(scale, other) for scale in given[2:]]
    moe.load_weights(*given[:2], *(to(scale, own) for scale in scales))
    expected = bits(moe)
    moe.load_weights(*weights(precision, 2))
    assert not same(bits(moe), expected)
    moe.load_weights(*given[:2], *scales)
    assert same(bits(moe), expected)
    assert [moe.state_dict()[name].dtype for name in SCALES] == [own] * 2
    moe.load_weights(*weights(precision, 2))
    moe.load_state_dict(dict(zip(FIELDS, (*given[:2], *scales), strict=True)))
    assert same(bits(moe), expected)


# --- what is refused


@pytest.fixture(scope="module")
def layer(precision):
    """With weights that nobody overwrites."""
    return loaded(precision)


def broken(precision: str, name: str, change) -> reference.Weights:
    given = weights(precision)
    return given._replace(**{name: change(getattr(given, name))})


def with_nan(scale: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    scale = scale.clone()
    scale[-1, -1, -1] = 255 if scale.dtype == torch.uint8 else value
    return scale


def with_infinity(scale: torch.Tensor) -> torch.Tensor:
    return with_nan(scale, float("inf"))


NO_NUMBER = r"(the exponent 255 \(NaN\)|a scale that is not finite) at expert 7, row"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        *((name, lambda t: t[:-1], rf"{name} has shape \[7,") for name in FIELDS),
        *((name, lambda t: t[..., :-1].contiguous(), rf"{name} has shape") for name in FIELDS),
        *((name, lambda t: t.to(torch.int8), f"{name} has dtype torch.int8") for name in FIELDS),
        *((name, lambda t: t.to("meta"), f"{name} is on device meta") for name in FIELDS),
        *((name, lambda t: t.tolist(), f"{name} must be a torch.Tensor, got list")
          for name in FIELDS),
        *((name, lambda t: None, f"{name} is missing") for name in SCALES),
        *((name, lambda t: t.half(), f"{name} has dtype torch.float16") for name in SCALES),
        *((name, change, f"{name} has {NO_NUMBER}") for name in SCALES
          for change in (with_nan, with_infinity)),
        *((name, lambda t: t.bfloat16(), f"{name} has dtype torch.bfloat16.*quantize_weights")
          for name in BYTES),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_written(precision, layer, name, change, words):
    moe, given = layer, broken(precision, name, change)
    expected = bits(moe)
    with pytest.raises(ValueError, match=words):
        moe.load_weights(*given)
    assert same(bits(moe), expected)
    if all(isinstance(t, torch.Tensor) for t in given):
        with pytest.raises(RuntimeError, match=words):
            moe.load_state_dict(state_of(given))
        assert same(bits(moe), expected)


# --- states


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("has_weights", [False, True])
def test_a_state_is_the_checkpoint_bit_for_bit(precision, has_weights, assign):
    given = DRAWN[precision]()
    moe = loaded(precision) if has_weights else make(precision=precision)
    assert sorted(moe.state_dict()) == sorted(FIELDS if has_weights else ())
    before = places(moe) if has_weights else None
    moe._captured = has_weights
    moe.load_state_dict(state_of(given), assign=assign)
    assert moe.requantized_groups == 0
    if has_weights:
        assert places(moe) == before
    state = moe.state_dict()
    assert sorted(state) == sorted(FIELDS)
    for name in FIELDS:
        assert state[name].dtype == getattr(given, name).dtype
        assert torch.equal(state[name], getattr(given, name))
    twin = make(precision=precision)
    twin.load_state_dict(state)
    assert same(bits(twin), bits(moe))


def test_a_state_that_does_not_fit_is_an_error_of_torch(precision):
    moe, given = loaded(precision), state_of(weights(precision))
    with pytest.raises(RuntimeError, match="w13 has shape"):
        moe.load_state_dict({**given, "w13": given["w13"][:2]})
    with pytest.raises(RuntimeError, match="Missing key.*w2"):
        moe.load_state_dict({"w13": given["w13"]})


def test_made_on_meta_and_loaded_elsewhere(precision):
    moe, arguments = make(precision=precision, device="meta"), inputs()
    moe.load_weights(*(tensor.to("meta") for tensor in weights(precision)))
    torch.nn.Sequential(moe).to_empty(device="cpu")
    place = places(moe)
    moe.load_weights(*weights(precision))
    assert places(moe) == place
    check(moe(*arguments), *arguments, precision)


def test_groups_that_were_rounded_are_counted():
    """What is over 2 ** 11 below the highest of its row; and the state then says what is there."""
    given = drawn_mxfp4(spread=0)
    moe = make(precision=MXFP4)
    for field, rows in (("w13_scale", 3), ("w2_scale", 5)):
        getattr(given, field)[1, :rows, 1] -= 12
    moe.load_weights(*given)
    lowered = [given.w13[1, :3, 16:32], given.w2[1, :5, 16:32]]
    # 12 below is one code lower: an odd multiple of a half, or 3, has no half of itself there.
    odd = [((codes & 7 == 1) | (codes & 7 == 3) | (codes & 0x70 == 0x10) | (codes & 0x70 == 0x30))
           for codes in lowered]  # fmt: skip
    assert moe.requantized_groups == sum(int(group.any(-1).sum()) for group in odd) > 0
    moe.load_weights(*weights(MXFP4))
    assert moe.requantized_groups == 0


@pytest.mark.nightly
def test_groups_that_hold_minus_8_are_counted():
    given = drawn_int4()
    kept = [matrix.clone() for matrix in given[:2]]
    for matrix, held, places in ((given.w13, kept[0], ((1, 3, 0), (1, 3, 1), (1, 3, 64))),
                                 (given.w2, kept[1], ((E - 1, H - 1, 63),))):  # fmt: skip
        for place in places:
            matrix[place], held[place] = 0x18, 0x19
    moe = make(precision=INT4)
    moe.load_weights(*given)
    assert moe.requantized_groups == 3
    state = moe.state_dict()
    assert torch.equal(state["w13"], kept[0]) and torch.equal(state["w2"], kept[1])
    moe.load_weights(*weights(INT4))
    assert moe.requantized_groups == 0


# --- forwards

#: Tokens of an expert, by the variant of a tile that takes them.
COUNTS = (9, 20, 40, 70)


def permuted(given: reference.Weights, order: torch.Tensor) -> reference.Weights:
    return reference.Weights(*(tensor[order] for tensor in given))


def test_experts_may_be_moved(precision):
    arguments, moe = inputs(), loaded(precision)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(5))
    for _, tensor in moe.kernel_tensors():
        tensor.copy_(tensor[order].clone())
    moved = permuted(weights(precision), order)
    check(moe(*arguments), *arguments, precision, given=moved)
    state = moe.state_dict()
    assert all(torch.equal(state[name], getattr(moved, name)) for name in FIELDS)


def test_exponents_at_both_ends():
    """0 and 254 in both matrices: gates are tiny and ups huge, and so are halves of the output."""
    rng = torch.Generator().manual_seed(6)
    given = weights(MXFP4)
    scales = [torch.randint(0, 5, s.shape, dtype=torch.uint8, generator=rng) for s in given[2:]]
    scales[0][:, I:], scales[1][:, H // 2 :] = 254, 254
    matrices = [matrix.clone() for matrix in given[:2]]
    huge = matrices[0][:, I:], matrices[1][:, H // 2 :]
    for matrix in huge:  # up to 1.5, which float32 holds; more is for the kernel alone
        matrix &= 0xBB
    huge[0][..., 16:] = 0
    huge[0][...] &= 0x99
    given = reference.Weights(*matrices, *scales)
    [x], [idx], _ = inputs(world=1, seed=4)
    x, idx = x * 2**-4, idx[:, :1].clamp_min(0).contiguous()
    # The router's weight keeps what is looked at in the range of BF16.
    router = torch.full((T, 1), 2.0**-20)
    router[T // 2 :] = 2.0**10
    moe = make(precision=MXFP4, world=1, top_k=1, max_tokens_per_rank=COUNTS[-1])
    moe.load_weights(*given)
    assert moe.requantized_groups == 0
    y = moe(x, idx, router)
    expected = reference.moe_forward(x, idx, router, *given, precision=MXFP4, compute=torch.float64)
    early, late = slice(0, T // 2), slice(T // 2, T)
    low, high = slice(0, H // 2), slice(H // 2, H)
    for part in ((early, high), (late, low)):
        assert expected[part].isfinite().all() and expected[part].any(-1).all()
        assert reference.relative_error(y[part], expected[part]) <= 2**-5
    state = moe.state_dict()
    assert all(torch.equal(state[name], getattr(given, name)) for name in FIELDS)


@pytest.mark.parametrize("clamp", [None, 0.25])
def test_the_smallest_layer(precision, clamp):
    rng = torch.Generator().manual_seed(8)
    w13, w2 = (torch.randn(2, rows, 128, generator=rng) * 128**-0.5 for rows in (256, 128))
    given = quantize_weights(w13, w2, precision)
    sizes = dict(num_experts=2, hidden_size=128, intermediate_size=128, world=1)
    moe = make(precision=precision, activation_clamp=clamp, **sizes)
    moe.load_weights(*given)
    x, idx = torch.randn(T, 128, generator=rng).bfloat16(), torch.arange(T * K).view(T, K) % 2
    router = torch.rand(T, K, generator=rng)
    y = moe(x, idx, router).clone()
    check([y], [x], [idx], [router], precision, clamp, given)
    [stored], [scale] = quantized(moe, [x])
    assert torch.equal(moe(stored, idx, router, scale), y)


@pytest.fixture(scope="module")
def crowded(precision):
    """A layer whose tokens can all meet in one tile."""
    return loaded(precision, world=1, top_k=1, max_tokens_per_rank=COUNTS[-1])


def forward_of_one_expert(moe, x: torch.Tensor) -> torch.Tensor:
    """By token, as bytes: the output, and what FC1 has stored, whose scale shows the last bit."""
    y = moe(x, torch.full((len(x), 1), 3), torch.full((len(x), 1), 0.75))
    regions = moe.workspace.regions(0)
    place = regions["routed_record"][0, : len(x), 0].argsort()  # of a token in the only tile
    hidden, scale = regions["fc1_output"][place], regions["fc1_output_scale"][0, 0, place, None]
    assert hidden.float().any() and (scale > 1e-6).any()
    return torch.cat([part.view(torch.uint8) for part in (y, hidden, scale)], dim=1)


def rows(seed: int, count: int = COUNTS[-1]) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("count", COUNTS)
def test_what_lies_beside_a_token_does_not_matter(crowded, count):
    """Other neighbours in its tile, another place there, and tiles of other sizes: the same bits.
    Two values that share a reciprocal must be of one token.
    """
    x, others = rows(1, count), rows(2, count)
    y = forward_of_one_expert(crowded, x)
    assert torch.equal(y, forward_of_one_expert(crowded, rows(1)[:count]))
    for kept in (slice(0, None, 2), slice(1, None, 2)):
        mixed = others.clone() * 30
        mixed[kept] = x[kept]
        assert torch.equal(forward_of_one_expert(crowded, mixed)[kept], y[kept])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    assert torch.equal(forward_of_one_expert(crowded, x[order]), y[order])
    few = forward_of_one_expert(crowded, x[:5])
    assert torch.equal(few, y[:5])


@pytest.mark.parametrize("count", COUNTS)
def test_a_token_of_nan_spoils_no_other(crowded, count):
    x = rows(1, count)
    y = forward_of_one_expert(crowded, x)
    for spoiled in (0, 5, count - 1):
        mixed = x.clone()
        mixed[spoiled, 7] = float("nan")
        seen = forward_of_one_expert(crowded, mixed)
        assert seen[spoiled, : 2 * H].view(torch.bfloat16).isnan().all()
        kept = torch.arange(count) != spoiled
        assert torch.equal(seen[kept], y[kept])
