"""MegaMoE on a machine without a GPU: forwards through the emulator, and every refusal."""

from __future__ import annotations

import pytest
import torch

from megamoe import MegaMoE, reference
from tests.routing import make_routing

E, K, H, I, T, W = 8, 2, 256, 128, 12, 2  # noqa: E741


def make(**changes) -> MegaMoE:
    arguments = {
        "num_experts": E,
        "top_k": K,
        "hidden_size": H,
        "intermediate_size": I,
        "max_tokens_per_rank": T,
        "world": W,
        "device": "cpu",
    }
    return MegaMoE(**(arguments | changes))


def weights(experts: int = E) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    w13 = torch.randn(experts, 2 * I, H, generator=rng) * H**-0.5
    w2 = torch.randn(experts, H, I, generator=rng) * I**-0.5
    return w13.bfloat16(), w2.bfloat16()


def inputs(world: int = W, tokens: int = T, seed: int = 0):
    ids, router = make_routing("masked", world, tokens, K, E, seed)
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, H, generator=rng).bfloat16() for _ in ids], ids, router


@pytest.fixture(scope="module")
def layer() -> MegaMoE:
    moe = make()
    moe.load_weights(*weights())
    return moe


def check(outputs, xs, ids, router) -> None:
    for y, x, idx, weight in zip(outputs, xs, ids, router, strict=True):
        expected = reference.moe_forward(x, idx, weight.nan_to_num(), *weights())
        assert reference.relative_error(y, expected) <= 2**-8


def test_forward_of_several_ranks(layer):
    for seed in range(3):
        arguments = inputs(seed=seed)
        check(layer(*arguments), *arguments)


def test_forward_of_one_rank_takes_plain_tensors():
    moe = make(world=1)
    moe.load_weights(*weights())
    xs, ids, router = inputs(world=1)
    y = moe(xs[0], ids[0].int(), router[0])
    assert isinstance(y, torch.Tensor)
    check([y], xs, ids, router)


def test_out_is_filled_and_returned(layer):
    xs, ids, router = inputs()
    out = [torch.full_like(x, float("nan")) for x in xs]
    outputs = layer(xs, ids, router, out=out)
    assert all(a is b for a, b in zip(outputs, out, strict=True))
    check(out, xs, ids, router)


def test_layers_share_a_workspace(layer):
    other = make(workspace=layer.workspace)
    other.load_weights(*weights())
    arguments = inputs(seed=5)
    for _ in range(2):
        check(layer(*arguments), *arguments)
        check(other(*arguments), *arguments)


def test_a_workspace_of_another_shape_is_refused(layer):
    with pytest.raises(ValueError, match="workspace on cpu is for"):
        make(workspace=layer.workspace, top_k=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": 3}, "num_experts=8 is not divisible by num_ranks=3"),
        ({"top_k": 17}, "top_k=17"),
        ({"hidden_size": 200}, "hidden_size=200"),
        ({"intermediate_size": 64}, "intermediate_size=64"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank=0"),
        ({"precision": "fp3"}, "precision='fp3'"),
        ({"device": "meta"}, "device='meta'"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"kernel_options": {"colour": 1}}, "kernel_options has no field 'colour'"),
        ({"kernel_options": {"num_stages": 9}}, "num_stages=9"),
        ({"kernel_options": {"math_registers": 240}}, "math_registers=240"),
    ],
)
def test_bad_configuration_names_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device='cuda', but torch sees no GPU"):
        make(device="cuda")


def test_forward_needs_weights():
    with pytest.raises(ValueError, match="weights are not loaded"):
        make()(*inputs())


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("w13", lambda w: w[:, :-1], r"w13 has shape \[8, 255, 256\], expected \[8, 256, 256\]"),
        ("w13", lambda w: w.float(), "w13 has dtype torch.float32, expected torch.bfloat16"),
        ("w2", lambda w: w.transpose(1, 2).contiguous().transpose(1, 2), "w2 .* not contiguous"),
        ("w2", lambda w: w[:4], r"w2 has shape \[4, 256, 128\]"),
        ("w2", lambda w: None, "w2 must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_weights_are_named(name, broken, message):
    w13, w2 = weights()
    pair = (broken(w13), w2) if name == "w13" else (w13, broken(w2))
    with pytest.raises(ValueError, match=message):
        make().load_weights(*pair)


def at(index: int, change):
    """Apply `change` to the tensor of one rank."""
    return lambda items: [change(item) if i == index else item for i, item in enumerate(items)]


@pytest.mark.parametrize(
    ("argument", "broken", "message"),
    [
        (0, at(1, lambda x: x[:, :128]), r"x\[1\] has shape \[12, 128\], expected \[12, 256\]"),
        (0, at(0, lambda x: x.half()), r"x\[0\] has dtype torch.float16"),
        (0, at(0, lambda x: x.repeat(2, 1)), r"x\[0\] has T=24 tokens > max_tokens_per_rank=12"),
        (0, at(1, lambda x: x.t().contiguous().t()), r"x\[1\] .* not contiguous"),
        (0, at(1, lambda x: x[0]), r"x\[1\] must be a tensor of shape \[T, 256\]"),
        (0, lambda items: items[:1], "x holds 1 tensors, expected one for each of 2 ranks"),
        (1, at(0, lambda i: i.float()), r"topk_idx\[0\] has dtype torch.float32"),
        (1, at(0, lambda i: i[:-1]), r"topk_idx\[0\] has shape \[11, 2\], expected \[12, 2\]"),
        (1, at(1, lambda i: i.clone().fill_(8)), r"topk_idx\[0, 0\] = 8 on rank 1"),
        (1, at(1, lambda i: i.clone().fill_(-2)), r"topk_idx\[0, 0\] = -2 on rank 1"),
        (2, at(0, lambda w: w.double()), r"topk_weights\[0\] has dtype torch.float64"),
        (2, at(0, lambda w: w.tolist()), r"topk_weights\[0\] must be a torch.Tensor, got list"),
        (2, lambda items: [*items, items[0]], "topk_weights holds 3 tensors"),
    ],
)
def test_bad_input_is_named_before_any_launch(layer, argument, broken, message):
    arguments = list(inputs())
    arguments[argument] = broken(arguments[argument])
    with pytest.raises(ValueError, match=message):
        layer(*arguments)
    good = inputs()
    check(layer(*good), *good)


def test_bad_out_is_named(layer):
    xs, ids, router = inputs()
    with pytest.raises(ValueError, match=r"out\[1\] has dtype torch.float32"):
        layer(xs, ids, router, out=[xs[0].clone(), xs[1].float()])


def test_regions_are_the_same_objects_before_and_after_forwards(layer):
    before = layer.workspace.regions(0)
    layer(*inputs())
    assert layer.workspace.regions(0) is before
