"""MegaMoE on a machine without a GPU: forwards of the kernel's PTX, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamoe import InvalidExpertError, MegaMoE, arguments, reference
from megamoe.architecture import ARCHITECTURES
from megamoe.machine.faults import StepLimit
from megamoe.precision import PRECISIONS
from tests.nights import built
from tests.unit.layers import (
    READ_WHERE_THEY_ARE,
    E,
    H,
    K,
    T,
    W,
    check,
    inputs,
    loaded,
    make,
    quantized,
    same,
    weights,
)
from workspace import Workspace

FP8_RECIPES = [name for name, recipe in PRECISIONS.items() if recipe.tokens.has_scales]


@pytest.fixture(scope="module")
def layer() -> MegaMoE:
    return loaded()


@pytest.fixture(scope="module", params=built())
def any_layer(request) -> MegaMoE:
    """A layer of every recipe."""
    return loaded(request.param)


@pytest.fixture(scope="module", params=built(FP8_RECIPES))
def scaled_layer(request) -> MegaMoE:
    return loaded(request.param)


def test_forward_of_several_ranks(any_layer):
    for seed in range(3):
        arguments = inputs(seed=seed)
        check(any_layer(*arguments), *arguments, any_layer.config.precision)


@pytest.mark.parametrize("precision", built())
def test_forward_of_one_rank_takes_plain_tensors(precision):
    moe = loaded(precision, world=1)
    xs, ids, router = inputs(world=1)
    counts = torch.zeros(E, dtype=torch.int32)
    y = moe(xs[0], ids[0].int(), router[0], expert_counts=counts)
    assert isinstance(y, torch.Tensor)
    check([y], xs, ids, router, precision)
    assert counts.sum() == (ids[0] >= 0).sum()
    if precision != "bf16":
        stored, scales = quantized(moe, xs)
        assert same([moe(stored[0], ids[0], router[0], scales[0])], [y])


def test_quantised_input_gives_the_same_bits(scaled_layer):
    xs, ids, router = inputs(seed=7)
    ys = scaled_layer(xs, ids, router)
    stored, scales = quantized(scaled_layer, xs)
    assert same(scaled_layer(stored, ids, router, scales), ys)
    mixed = [stored[0], xs[1]], ids, router, [scales[0], None]
    assert same(scaled_layer(*mixed), ys)


def test_quantised_input_may_be_in_its_buffers(scaled_layer):
    xs, ids, router = inputs(seed=8)
    ys = scaled_layer(xs, ids, router)
    for rank, (x, scale) in enumerate(zip(*quantized(scaled_layer, xs), strict=True)):
        scaled_layer.input_buffer(rank)[:T] = x
        scaled_layer.input_scale_buffer(rank)[:T] = scale
    stored = [scaled_layer.input_buffer(rank)[:T] for rank in range(W)]
    scales = [scaled_layer.input_scale_buffer(rank)[:T] for rank in range(W)]
    assert same(scaled_layer(stored, ids, router, scales), ys)


def test_input_buffers_have_the_dtype_that_tokens_travel_in(any_layer):
    recipe = any_layer.config.recipe
    buffer = any_layer.input_buffer(1)
    assert buffer.shape == (T, H) and buffer.dtype == getattr(torch, recipe.tokens.storage)
    if not recipe.tokens.has_scales:
        with pytest.raises(ValueError, match="precision='bf16' has no scales"):
            any_layer.input_scale_buffer()
        return
    scales = any_layer.input_scale_buffer(1)
    assert scales.dtype == torch.float32
    assert scales.shape == (T, 1 if recipe.name == "fp8_channel" else H // 128)
    assert scales.data_ptr() == any_layer.workspace.regions(1)["input_scale_buffer"].data_ptr()


@pytest.mark.parametrize("precision", READ_WHERE_THEY_ARE)
def test_weights_are_not_copied(precision):
    """A forward reads what they hold then, as a launch on a GPU does."""
    arguments = inputs()
    given, other = weights(precision), weights(precision, seed=2)
    moe = make(precision=precision)
    moe.load_weights(*given)
    check(moe(*arguments), *arguments, precision)
    for name, tensor in given._asdict().items():
        if tensor is not None:
            tensor.copy_(getattr(other, name))
    check(moe(*arguments), *arguments, precision, given=given)


def test_expert_counts_are_added_up(any_layer):
    xs, ids, router = inputs(seed=9)
    counts = [torch.full((E // W,), 5 * rank, dtype=torch.int32) for rank in range(W)]
    for _ in range(2):
        any_layer(xs, ids, router, expert_counts=counts)
    flat = torch.cat([idx.flatten() for idx in ids])
    rows = torch.bincount(flat[flat >= 0], minlength=E).view(W, -1)
    for rank in range(W):
        assert torch.equal(counts[rank], (5 * rank + 2 * rows[rank]).int())


@pytest.mark.parametrize("precision", built())
def test_the_activation_is_clamped(precision):
    arguments = inputs(seed=10)
    moe = loaded(precision, activation_clamp=0.25)
    ys = [y.clone() for y in moe(*arguments)]
    check(ys, *arguments, precision, 0.25)
    free = loaded(precision, workspace=moe.workspace)(*arguments)
    assert all(reference.relative_error(a, b) > 0.1 for a, b in zip(ys, free, strict=True))


def test_out_is_filled_and_returned(layer):
    xs, ids, router = inputs()
    out = [torch.full_like(x, float("nan")) for x in xs]
    outputs = layer(xs, ids, router, out=out)
    assert all(a is b for a, b in zip(outputs, out, strict=True))
    check(out, xs, ids, router)


def test_out_may_lie_side_by_side(layer):
    xs, ids, router = inputs()
    out = list(torch.empty(W, T, H, dtype=torch.bfloat16))
    check(layer(xs, ids, router, out=out), xs, ids, router)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit(any_layer, dtype):
    arguments = inputs(seed=11)
    ys = any_layer(*arguments)
    with torch.autocast("cpu", dtype):
        assert same(any_layer(*arguments), ys)


def test_the_default_device_changes_nothing(any_layer):
    arguments = inputs(seed=11)
    ys = any_layer(*arguments)
    given = weights(any_layer.config.precision)
    with torch.device("meta"):
        assert same(any_layer(*arguments), ys)
        moe = make(precision=any_layer.config.precision)
        moe.load_weights(*given)
        assert same(moe(*arguments), ys)


@pytest.mark.parametrize("precision", built())
@pytest.mark.parametrize(("made", "first"), [(True, True), (True, False), (False, True)])
def test_a_layer_works_inside_and_outside_inference_mode(precision, made, first):
    """Where it was made, and where its first forward was, do not matter."""
    xs, ids, router = inputs(seed=12)
    with torch.inference_mode(made):
        moe = loaded(precision)
    with torch.inference_mode(first):
        moe(xs, ids, router)
        moe.input_buffer(0)
    for inside in (False, True, False):
        with torch.inference_mode(inside):
            moe.recover()
            arguments = xs, ids, router
            stored, scales = xs, [None] * W
            if precision != "bf16":
                stored, scales = quantized(moe, xs)
                moe.input_scale_buffer(0)[:T].copy_(scales[0])
                scales[0] = moe.input_scale_buffer(0)[:T]
            moe.input_buffer(0).copy_(stored[0])
            stored = [moe.input_buffer(0)[:T], stored[1]]
            check(moe(stored, ids, router, scales), *arguments, precision)


def test_rows_of_the_input_buffer_past_the_tokens_stay(any_layer):
    xs, ids, router = inputs(seed=13)
    scales = [None] * W
    if any_layer.config.recipe.tokens.has_scales:
        xs, scales = quantized(any_layer, xs)
    buffers = [any_layer.input_buffer(rank) for rank in range(W)]
    half = slice(0, T // 2), slice(T // 2, T)
    for rank, (buffer, scale) in enumerate(zip(buffers, scales, strict=True)):
        buffer[:T] = xs[rank]
        if scale is not None:
            any_layer.input_scale_buffer(rank)[:T] = scale
            scales[rank] = any_layer.input_scale_buffer(rank)
    for rows in half:
        staged = [buffer[rows] for buffer in buffers]
        some = [None if scale is None else scale[rows].contiguous() for scale in scales]
        ys = any_layer(staged, [i[rows] for i in ids], [r[rows] for r in router], some)
        assert all(torch.isfinite(y).all() for y in ys)
    for buffer, x in zip(buffers, xs, strict=True):
        assert torch.equal(buffer[half[1]].view(torch.uint8), x[half[1]].view(torch.uint8))


def test_layers_share_a_workspace(layer):
    other = make(workspace=layer.workspace)
    other.load_weights(*weights())
    arguments = inputs(seed=5)
    for _ in range(2):
        check(layer(*arguments), *arguments)
        check(other(*arguments), *arguments)


def stop(moe: MegaMoE, steps: int) -> None:
    """A launch of this layer that ends after so many instructions."""
    moe.backend.settings = {"max_steps": steps}
    with pytest.raises(StepLimit):
        moe(*inputs())
    moe.backend.settings = {}


@pytest.mark.parametrize("steps", [1000, 40_000])
def test_the_next_forward_recovers_after_a_failed_one(steps):
    moe = loaded()
    other = loaded(workspace=moe.workspace)
    arguments = inputs(seed=6)
    for layers in ((moe, other), (other, moe), (moe, other, moe, other)):
        stop(moe, steps)
        for layer in layers:
            check(layer(*arguments), *arguments)


@pytest.mark.parametrize("recovered", [0, 1])
def test_one_of_the_layers_of_a_workspace_may_recover_it(recovered):
    moe = loaded()
    layers = moe, loaded(workspace=moe.workspace)
    arguments = inputs(seed=6)
    check(layers[1](*arguments), *arguments)
    stop(moe, 40_000)
    layers[recovered].recover()
    for layer in layers:
        check(layer(*arguments), *arguments)


def test_a_workspace_of_another_shape_is_refused(layer):
    with pytest.raises(ValueError, match="workspace is of another layer: top_k=2, not 1$"):
        make(workspace=layer.workspace, top_k=1)
    with pytest.raises(ValueError, match=r": kernel.lag_waves=2, not 3, kernel.trace=False, not T"):
        make(workspace=layer.workspace, kernel_options={"lag_waves": 3, "trace": True})


@pytest.mark.parametrize("workspace", [5, 0, "workspace", object()])
def test_what_is_no_workspace_is_refused(workspace):
    kind = type(workspace).__name__
    with pytest.raises(ValueError, match=f"workspace must be that of another layer, got {kind}"):
        make(workspace=workspace)


def test_a_workspace_on_another_device_is_refused(layer):
    elsewhere = Workspace(layer.layout, "meta", allocation=layer.workspace.allocation)
    with pytest.raises(ValueError, match="workspace is of another layer: device='meta', not 'cpu'"):
        make(workspace=elsewhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": 3}, "num_experts=8 is not divisible by num_ranks=3"),
        ({"top_k": 17}, "top_k=17"),
        ({"hidden_size": 200}, "hidden_size=200"),
        ({"intermediate_size": 64}, "intermediate_size=64"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank=0"),
        ({"precision": "fp3"}, "precision='fp3'"),
        ({"precision": []}, r"precision=\[\]"),
        ({"device": "xpu"}, "device='xpu' is not supported"),
        ({"device": "bogus"}, "device='bogus'"),
        ({"device": 1.5}, "device=1.5"),
        ({"num_sms": 0}, "num_sms=0 must be an integer >= 1"),
        ({"num_sms": -5}, "num_sms=-5 must be"),
        ({"num_sms": 1.5}, "num_sms=1.5 must be"),
        ({"num_sms": True}, "num_sms=True must be"),
        ({"num_sms": "a"}, "num_sms='a' must be"),
        ({"timeout_s": 0}, "timeout_s=0 must be > 0 and at most 86400 seconds"),
        ({"timeout_s": -1.0}, "timeout_s=-1.0 must be"),
        ({"timeout_s": float("nan")}, "timeout_s=nan must be"),
        ({"timeout_s": float("inf")}, "timeout_s=inf must be"),
        ({"timeout_s": 86401}, "timeout_s=86401 must be"),
        ({"timeout_s": None}, "timeout_s=None must be"),
        ({"timeout_s": "a"}, "timeout_s='a' must be"),
        ({"timeout_s": True}, "timeout_s=True must be"),
        ({"start_timeout_s": 0}, "start_timeout_s=0 must be > 0 and at most 86400 seconds"),
        ({"start_timeout_s": "a"}, "start_timeout_s='a' must be"),
        ({"activation_clamp": 0.0}, "activation_clamp=0.0 must be"),
        ({"activation_clamp": -1}, "activation_clamp=-1 must be"),
        ({"activation_clamp": float("inf")}, "activation_clamp=inf must be"),
        ({"activation_clamp": float("nan")}, "activation_clamp=nan must be"),
        ({"activation_clamp": "7"}, "activation_clamp='7' must be"),
        ({"activation_clamp": 10**400}, "activation_clamp=10*0 must be"),
        ({"activation_clamp": 1e39}, r"activation_clamp=1e\+39 must be"),
        ({"kernel_options": {"colour": 1}}, "kernel_options has no field 'colour'"),
        ({"kernel_options": {"num_stages": 9}}, "num_stages=9"),
        ({"kernel_options": {"math_registers": 240}}, "math_registers=240"),
        ({"kernel_options": {"block_m": "a"}}, "block_m='a'"),
        ({"kernel_options": {1: 2}}, r"kernel_options={1: 2} must be a dict"),
        ({"kernel_options": ["trace"]}, r"kernel_options=\['trace'\] must be a dict"),
    ],
)
def test_bad_configuration_names_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_a_timeout_may_be_a_day():
    assert make(timeout_s=86400).limits.timeout_s == 86400


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device='cuda', but torch sees no GPU"):
        make(device="cuda")


def test_a_gpu_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device='cuda:2', but torch sees 2 GPUs"):
        make(device="cuda:2")


def test_the_capability_of_a_gpu_selects_the_kernel(monkeypatch):
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, config = torch.device("cuda:0"), make().config
    assert arguments.kernel_config_of(config, None, gpu).arch == "sm_90a"
    other = replace(ARCHITECTURES["sm_90a"], name="sm_99a", capability=(9, 9))
    monkeypatch.setitem(ARCHITECTURES, other.name, other)
    assert arguments.kernel_config_of(config, {"lag_waves": 3}, gpu).arch == "sm_90a"
    capability = (9, 9)
    kernel = arguments.kernel_config_of(config, {"lag_waves": 3}, gpu)
    assert (kernel.arch, kernel.lag_waves) == ("sm_99a", 3)

    asked = arguments.kernel_config_of(config, {"arch": "sm_90a"}, gpu)
    with pytest.raises(ValueError, match=r"capability \(9, 9\), arch='sm_90a' needs \(9, 0\)"):
        arguments.check_gpu(gpu, asked, None, 1)
    capability = (8, 0)
    with pytest.raises(ValueError, match=r"\(8, 0\), kernels are for \(9, 0\) \(sm_90a\), "):
        arguments.kernel_config_of(config, None, gpu)


def test_forward_needs_weights():
    with pytest.raises(ValueError, match="weights are not loaded"):
        make()(*inputs())


@pytest.mark.parametrize("precision", built())
def test_bad_weights_are_named(precision):
    """What is bad `check_weights` knows."""
    given = weights(precision)
    columns = given.w13.shape[-1]
    words = rf"w13 has shape \[8, 255, {columns}\], expected \[8, 256, {columns}\]"
    with pytest.raises(ValueError, match=words):
        make(precision=precision).load_weights(given.w13[:, :-1], *given[1:])


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


@pytest.mark.parametrize("expert", [-2, E, 2**40])
def test_an_invalid_expert_is_the_error_of_a_gpu(layer, expert):
    xs, ids, router = inputs()
    ids[1][3, 1] = expert
    with pytest.raises(InvalidExpertError) as error:
        layer(xs, ids, router)
    assert str(error.value) == (
        f"topk_idx[3, 1] = {expert} on rank 1 is not in -1..{E - 1} (num_experts={E}); "
        "the slot was treated as masked"
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, None, "x must be a tensor, or a list of one for each rank, got NoneType"),
        (0, 5, "x must be a tensor, or a list of one for each rank, got int"),
        (1, None, "topk_idx must be a tensor"),
        (2, 1.0, "topk_weights must be a tensor"),
        (3, 1, "x_scale must be a tensor"),
        (4, True, "out must be a tensor"),
        (5, 1, "expert_counts must be a tensor"),
    ],
)
def test_an_argument_that_holds_no_tensors_is_named(layer, argument, value, message):
    arguments = [*inputs(), None, None, None]
    arguments[argument] = value
    with pytest.raises(ValueError, match=message):
        layer(*arguments)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one item past a multiple of 16 bytes."""
    raw = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return raw[1:].view(tensor.shape).copy_(tensor)


def test_misaligned_input_and_output_are_refused(any_layer):
    xs, ids, router = inputs()
    message = r"\[1\] starts at address .*, not a multiple of 16"
    with pytest.raises(ValueError, match="x" + message):
        any_layer([xs[0], moved(xs[1])], ids, router)
    with pytest.raises(ValueError, match="out" + message):
        any_layer(xs, ids, router, out=[xs[0].clone(), moved(xs[1])])
    if any_layer.config.recipe.tokens.has_scales:
        stored, scales = quantized(any_layer, xs)
        with pytest.raises(ValueError, match="x" + message):
            any_layer([stored[0], moved(stored[1])], ids, router, scales)


def test_the_rest_of_the_input_may_start_at_any_item(any_layer):
    xs, ids, router = inputs()
    counts = [torch.zeros(E // W, dtype=torch.int32) for _ in range(W)]
    ys = [y.clone() for y in any_layer(xs, ids, router, expert_counts=counts)]
    others = [moved(torch.zeros_like(count)) for count in counts]
    narrow = [moved(idx.int()) for idx in ids]
    assert same(any_layer(xs, narrow, list(map(moved, router)), expert_counts=others), ys)
    assert same(others, counts)
    if any_layer.config.recipe.tokens.has_scales:
        stored, scales = quantized(any_layer, xs)
        assert same(any_layer(stored, ids, router, list(map(moved, scales))), ys)


def test_an_empty_tensor_may_start_anywhere(layer):
    xs, ids, router = inputs()
    empty = moved(xs[1])[:0]
    ys = layer(
        [xs[0], empty], [ids[0], ids[1][:0]], [router[0], router[1][:0]], out=[xs[0].clone(), empty]
    )
    assert ys[1] is empty


def test_the_buffers_of_a_rank_elsewhere_are_refused(scaled_layer):
    for rank in (W, -1, "0"):
        for buffer in (scaled_layer.input_buffer, scaled_layer.input_scale_buffer):
            with pytest.raises(
                ValueError, match=rf"rank={rank!r} is none of this process.*\[0, 1\]"
            ):
                buffer(rank)


def test_bad_out_is_named(layer):
    xs, ids, router = inputs()
    with pytest.raises(ValueError, match=r"out\[1\] has dtype torch.float32"):
        layer(xs, ids, router, out=[xs[0].clone(), xs[1].float()])


def test_out_that_overlaps_is_refused(layer):
    xs, ids, router = inputs()
    free = torch.empty(2 * T, H, dtype=torch.bfloat16)
    for out in ([free[:T], free[:T]], [free[1:][:T], free[:T]]):
        with pytest.raises(ValueError, match=r"out\[0\] and out\[1\] overlap"):
            layer(xs, ids, router, out=out)
    x = free[3:][:T]
    for out in (x, free[:T], free[T:]):
        with pytest.raises(ValueError, match=r"out\[1\] and x\[1\] overlap"):
            layer([xs[0], x], ids, router, out=[xs[0].clone(), out])
        with pytest.raises(ValueError, match=r"out\[0\] and x\[1\] overlap"):  # of another rank
            layer([xs[0], x], ids, router, out=[out, xs[0].clone()])


def test_the_implicit_output_may_not_be_read(any_layer):
    """Rows of it are written while others are still to be read: the last output as x, say."""
    xs, ids, router = inputs()
    buffers = [any_layer.workspace.regions(rank)["layer_output"] for rank in range(W)]
    for row in (0, 1, T - 1):
        rest = slice(row, None)
        taken = [xs[0], buffers[1][rest]], [ids[0], ids[1][rest]], [router[0], router[1][rest]]
        if row < T - row:
            with pytest.raises(ValueError, match=r"the output\[1\] and x\[1\] overlap: pass out="):
                any_layer(*taken)
        else:  # rows beyond those that are written
            any_layer(*taken)
    with pytest.raises(ValueError, match=r"the output\[0\] and topk_weights\[1\] overlap"):
        weights = buffers[0].view(-1).view(torch.float32)[: T * K].view(T, K)
        any_layer(xs, ids, [router[0], weights])
    for buffer, x in zip(buffers, xs, strict=True):
        buffer.copy_(x)
    out = [torch.empty_like(x) for x in xs]
    ys = any_layer(buffers, ids, router, out=out)
    check(ys, xs, ids, router, any_layer.config.precision)


def test_counts_may_share_no_memory_with_what_is_read(layer):
    xs, ids, router = inputs()
    counts = [torch.zeros(E // W, dtype=torch.int32) for _ in range(W)]
    narrow = [idx.int() for idx in ids]
    with pytest.raises(ValueError, match=r"expert_counts\[0\] and topk_idx\[1\] overlap"):
        layer(xs, narrow, router, expert_counts=[narrow[1].view(-1)[: E // W], counts[1]])
    with pytest.raises(ValueError, match=r"expert_counts\[0\] and expert_counts\[1\] overlap"):
        layer(xs, ids, router, expert_counts=[counts[0], counts[0]])


def test_what_cannot_be_written_is_refused_before_the_launch(layer):
    xs, ids, router = inputs()
    out = [x.clone() for x in xs]
    counts = [torch.zeros(E // W, dtype=torch.int32) for _ in range(W)]
    with torch.inference_mode():
        frozen, frozen_counts = [x.clone() for x in xs], [count.clone() for count in counts]
        check(layer(xs, ids, router, out=frozen, expert_counts=frozen_counts), xs, ids, router)
    learned = out[1].clone().requires_grad_()
    launches = layer.backend.launches
    with pytest.raises(ValueError, match=r"out\[1\] requires grad"):
        layer(xs, ids, router, out=[out[0], learned])
    with pytest.raises(ValueError, match=r"out\[0\] is an inference tensor"):
        layer(xs, ids, router, out=frozen)
    with pytest.raises(ValueError, match=r"expert_counts\[1\] is an inference tensor"):
        layer(xs, ids, router, expert_counts=[counts[0], frozen_counts[1]])
    assert layer.backend.launches == launches
    with torch.no_grad():
        check(layer(xs, ids, router, out=[out[0], learned]), xs, ids, router)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda counts: counts[:1], "expert_counts holds 1 tensors"),
        (lambda counts: [c.long() for c in counts], r"expert_counts\[0\] has dtype torch.int64"),
        (lambda counts: [c[:3] for c in counts], r"expert_counts\[0\] has shape \[3\]"),
    ],
)
def test_bad_expert_counts_are_named(layer, broken, message):
    counts = [torch.zeros(E // W, dtype=torch.int32) for _ in range(W)]
    with pytest.raises(ValueError, match=message):
        layer(*inputs(), expert_counts=broken(counts))


def test_bad_scales_of_the_input_are_named(scaled_layer):
    xs, ids, router = inputs()
    stored, scales = quantized(scaled_layer, xs)
    for index, (x, scale, message) in enumerate(
        [
            (stored, [None, scales[1]], r"x_scale\[0\] is missing: x of torch.float8_e4m3fn"),
            (stored, None, r"x_scale\[0\] is missing"),
            (xs, scales, r"x\[0\] has dtype torch.bfloat16, expected torch.float8_e4m3fn"),
            ([x.float() for x in xs], None, r"x\[0\] has dtype torch.float32"),
            (stored, [scales[0].double(), scales[1]], r"x_scale\[0\] has dtype torch.float64"),
            (stored, [scales[0], scales[1][:-1]], r"x_scale\[1\] has shape \[11,"),
            (stored, [scales[0], None, None], "x_scale holds 3 tensors"),
            (stored, [7.0, scales[1]], r"x_scale\[0\] must be a torch.Tensor, got float"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            scaled_layer(x, ids, router, scale)
            pytest.fail(f"case {index} passed")


def test_scales_that_only_start_in_their_buffer_are_refused(scaled_layer):
    """Rows of the buffer are padded to 16 bytes; packed rows there would be read wrong."""
    xs, ids, router = inputs()
    stored, scales = quantized(scaled_layer, xs)
    region = scaled_layer.workspace.regions(0)["input_scale_buffer"]
    scales[0] = region.view(-1)[: scales[0].numel()].view(scales[0].shape)
    with pytest.raises(ValueError, match=r"x_scale\[0\] starts in the scale buffer, but has shape"):
        scaled_layer(stored, ids, router, scales)


def test_an_empty_rank_may_pass_empty_scales(scaled_layer):
    xs, ids, router = inputs()
    xs[1], ids[1], router[1] = xs[1][:0], ids[1][:0], router[1][:0]
    stored, scales = quantized(scaled_layer, xs)
    ys = scaled_layer(stored, ids, router, scales)
    assert ys[1].shape == (0, H)
    assert same(ys, scaled_layer(xs, ids, router))


def test_bf16_takes_no_scales(layer):
    xs, ids, router = inputs()
    with pytest.raises(ValueError, match=r"x_scale\[0\] is given, but precision='bf16' has no"):
        layer(xs, ids, router, [torch.ones(T, 2), None])
    with pytest.raises(ValueError, match=r"x\[0\] has dtype torch.float8_e4m3fn, expected"):
        layer([x.to(torch.float8_e4m3fn) for x in xs], ids, router)


def test_regions_are_the_same_objects_before_and_after_forwards(layer):
    before = layer.workspace.regions(0)
    layer(*inputs())
    assert layer.workspace.regions(0) is before
