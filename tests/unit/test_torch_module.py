"""The layer among torch's modules: found, moved, copied, compiled, differentiated, closed."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch

from megamoe import MegaMoE, streams
from megamoe.custom_op import FORWARD_ONLY
from tests.nights import built
from tests.unit.layers import E, H, K, T, check, inputs, loaded, make, quantized, same, weights


class Block(torch.nn.Module):
    """A router, the layer, and something of a model around it."""

    def __init__(self, precision: str = "bf16", counts: bool = False):
        super().__init__()
        self.router = torch.nn.Linear(H, E, bias=False, dtype=torch.bfloat16)
        self.experts = loaded(precision, world=1)
        self.counts = torch.zeros(E, dtype=torch.int32) if counts else None

    def forward(self, x):
        scores = self.router(x).float().softmax(-1)
        weights, idx = scores.topk(K)
        y = self.experts(x * 2, idx, weights, expert_counts=self.counts)
        return torch.nn.functional.silu(y) + x


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(3)
    return Block()


def tokens(seed: int = 0, count: int = T) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)).bfloat16()


# --- as a module


def test_it_is_a_module_with_its_sizes(block):
    assert isinstance(block.experts, torch.nn.Module)
    assert dict(block.named_modules())["experts"] is block.experts
    assert "(experts): MegaMoE(num_experts=8, top_k=2, hidden_size=256" in repr(block)
    assert "precision='bf16', device='cpu')" in repr(block)
    assert sorted(block.state_dict()) == ["experts.w13", "experts.w2", "router.weight"]
    assert block.train().eval().experts.training is False
    seen = []
    handle = block.experts.register_forward_hook(lambda *call: seen.append(call[2].shape))
    block(tokens())
    handle.remove()
    assert seen == [(T, H)]


@pytest.mark.parametrize("precision", built())
def test_to_where_it_is_changes_nothing(precision):
    moe, arguments = loaded(precision), inputs()
    before = [tensor.data_ptr() for _, tensor in moe.kernel_tensors()]
    assert moe.to("cpu") is moe and moe.cpu() is moe
    if precision == "bf16":
        moe.to(torch.bfloat16).bfloat16()
    assert [tensor.data_ptr() for _, tensor in moe.kernel_tensors()] == before
    moe.share_memory()  # elsewhere, and right
    check(moe(*arguments), *arguments, precision)


@pytest.mark.parametrize("precision", built())
def test_to_elsewhere_or_another_dtype_is_refused(precision):
    moe, arguments = loaded(precision), inputs()
    model = torch.nn.Sequential(moe)
    with pytest.raises(ValueError, match="stays on its device, cpu, and cannot go to meta"):
        model.to("meta")
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match=f"keeps its dtypes.*cannot become {dtype}"):
            model.to(dtype)
    if precision != "bf16":
        with pytest.raises(ValueError, match="keeps its dtypes.*cannot become torch.bfloat16"):
            model.bfloat16()
    check(moe(*arguments), *arguments, precision)


@pytest.mark.parametrize("precision", built())
@pytest.mark.parametrize("context", [False, True])
def test_made_on_meta_and_filled_elsewhere(precision, context):
    """Nothing is allocated, and weights may be declared, before it comes to a device."""
    arguments, given = inputs(), weights(precision)
    if context:
        with torch.device("meta"):
            moe = make(precision=precision, device=None)
    else:
        moe = make(precision=precision, device="meta")
    assert moe.workspace is None
    moe.load_weights(*(None if t is None else t.to("meta") for t in given))
    assert moe.w13.device.type == "meta"
    with pytest.raises(ValueError, match="on device 'meta': call to_empty"):
        moe(*arguments)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(moe)))
    for layer in (moe, twin):
        torch.nn.Sequential(layer).to_empty(device="cpu")
        assert layer.device.type == "cpu" and layer.w13.device.type == "cpu"
        layer.load_state_dict({k: v for k, v in given._asdict().items() if v is not None})
        check(layer(*arguments), *arguments, precision)


def test_a_layer_without_weights_comes_from_meta_too():
    moe = make(device="meta").to_empty(device="cpu")
    with pytest.raises(ValueError, match="weights are not loaded"):
        moe(*inputs())
    moe.load_weights(*weights())
    check(moe(*inputs()), *inputs())
    with pytest.raises(ValueError, match="device='meta' is none"):
        make(device="meta", workspace=moe.workspace)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_with_the_reason(block, how):
    with pytest.raises(TypeError, match="owns memory that other layers and ranks share"):
        how(block.experts)
    if how is not copy.copy:
        with pytest.raises(TypeError, match="Save its state_dict"):
            how(block)


# --- its end


def test_close_lets_parameters_go():
    moe, given = make(), weights()
    moe.load_weights(*(torch.nn.Parameter(t, requires_grad=False) for t in given.present))
    assert len([*moe.parameters()]) == 2
    moe.close()
    assert not [*moe.parameters()] and moe.w13 is None


def test_close_gives_memory_back_and_refuses_what_comes_after():
    moe, arguments = loaded(), inputs()
    check(moe(*arguments), *arguments)
    memory = weakref.ref(moe.workspace.allocation.spaces[0]["local"])
    workspace = weakref.ref(moe.workspace)
    machine = weakref.ref(moe.backend.machine)  # the kernel, which is cached, lives on
    moe.close()
    moe.close()
    gc.collect()
    assert memory() is None and workspace() is None and machine() is None
    for call in (
        lambda: moe(*arguments), moe.synchronize, moe.recover, moe.meet,
        lambda: moe.load_weights(*weights()), moe.refresh_scales, lambda: moe.local_ranks,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the layer was closed"):
            call()
    assert "MegaMoE(" in repr(moe)


def test_a_closed_layer_leaves_its_workspace_to_others():
    moe, arguments = loaded(), inputs()
    with loaded(workspace=moe.workspace) as other:
        moe.close()
        check(other(*arguments), *arguments)
        third = loaded(workspace=other.workspace)
    check(third(*arguments), *arguments)


def test_an_error_in_the_block_closes_too():
    with pytest.raises(KeyError), loaded() as moe:
        raise KeyError
    with pytest.raises(ValueError, match="closed"):
        moe(*inputs())


@pytest.mark.parametrize("how", ["close", "del", "cycle"])
def test_a_layer_that_goes_waits_for_its_launches(how):
    moe = loaded()
    ended = []
    moe.backend.close = lambda: ended.append(True)
    if how == "close":
        moe.close()
    if how == "cycle":
        moe.itself = [moe]
    del moe
    gc.collect()
    assert ended == [True]


# --- autograd


def test_nothing_is_recorded_and_backward_is_an_error():
    """An x that requires grad used to keep every step's activations alive, in a staging buffer."""
    moe = loaded()
    xs, ids, router = inputs()
    linear = torch.nn.Linear(H, H, dtype=torch.bfloat16)
    alive = []
    for _ in range(5):
        a = tokens()
        ys = moe([linear(a), xs[1]], ids, router)
        assert ys[0].requires_grad and ys[0].grad_fn is not None
        with pytest.raises(RuntimeError, match=FORWARD_ONLY[:60]):
            ys[0].float().sum().backward()
        alive.append(weakref.ref(a))
        del a, ys
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    for view in moe.workspace.regions(0).values():
        assert not view.requires_grad and view.grad_fn is None


@pytest.mark.parametrize("which", ["x", "router", "weight"])
def test_whatever_requires_grad_is_noticed(which):
    moe = make()
    given = [torch.nn.Parameter(t, which == "weight") for t in weights()[:2]]
    moe.load_weights(*given)
    xs, ids, router = inputs()
    if which == "x":
        xs[1].requires_grad_()
    if which == "router":
        router[0].requires_grad_()
    ys = moe(xs, ids, router)
    check([y.detach() for y in ys], xs, ids, [r.detach() for r in router])
    with pytest.raises(RuntimeError, match="forward only: no gradient passes through it"):
        sum(y.float().sum() for y in ys).backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not any(y.requires_grad for y in moe(xs, ids, router))
    out = [torch.empty_like(x) for x in xs]
    ys = moe(xs, ids, router, out=out)
    assert same([y.detach() for y in ys], out) and ys[0].requires_grad


def test_without_gradients_nothing_changes():
    moe, (xs, ids, router) = loaded(), inputs()
    ys = moe(xs, ids, router)
    assert ys[0].grad_fn is None and not ys[0].requires_grad
    ys[0].add_(1)  # engines add shared experts in place


# --- torch.compile


@pytest.fixture(autouse=True)
def forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_holds_one_graph(block, backend, mode):
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for seed in range(2):
        with mode():
            x = tokens(seed)
            assert torch.equal(compiled(x), block(x))


def test_a_compiled_model_under_autocast(block):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(tokens()), block(tokens()))


@pytest.mark.nightly
def test_a_model_compiled_by_the_default_backend():
    block = Block(counts=True)
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for seed, count in enumerate((T, T, 3, 1)):  # other sizes: dynamic shapes
            x = tokens(seed, count)
            expected = block(x)
            torch.testing.assert_close(compiled(x), expected, rtol=0.02, atol=0.02)
            assert block.counts.sum() == 2 * count * K
            block.counts.zero_()


def test_backward_through_a_compiled_model_is_an_error_when_it_runs(block):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y = compiled(tokens())
    with pytest.raises(RuntimeError, match="forward only: no gradient passes through it"):
        y.float().sum().backward()


@pytest.mark.parametrize("precision", built())
def test_lists_of_ranks_and_stored_inputs_are_compiled(precision):
    moe = loaded(precision)
    xs, ids, router = inputs()
    scales = None
    if precision != "bf16":
        xs, scales = quantized(moe, xs)
    counts = [torch.zeros(E // 2, dtype=torch.int32) for _ in xs]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(xs, ids, router, scales, counts):
        return [y + 1 for y in moe(xs, ids, router, scales, expert_counts=counts)]

    with torch.no_grad():
        expected = [y + 1 for y in moe(xs, ids, router, scales)]
        assert same(call(xs, ids, router, scales, counts), expected)
    assert torch.cat(counts).sum() == sum((idx >= 0).sum() for idx in ids)


def test_an_output_that_is_given_is_written_by_compiled_code(block):
    moe = block.experts
    [x], [idx], [router] = inputs(world=1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, out):
        moe(x, idx, router, out=out)
        return out * 2

    out = torch.full((T, H), float("nan"), dtype=torch.bfloat16)
    with torch.no_grad():
        y = call(x, out)
        expected = moe(x, idx, router)
    assert torch.equal(out, expected) and torch.equal(y, expected * 2)


def test_two_layers_of_one_workspace_do_not_share_outputs_in_compiled_code():
    """In eager the second forward overwrites the output of the first; a compiler may move a use of
    the first behind the second.
    """
    first = loaded(world=1)
    second = make(world=1, workspace=first.workspace)
    second.load_weights(*weights(seed=2))
    [x], [idx], [router] = inputs(world=1)

    def call(x):
        a = first(x, idx, router)
        b = second(x, idx, router)
        return a, b, a + b

    with torch.no_grad():
        a = first(x, idx, router).clone()
        b = second(x, idx, router).clone()
        seen = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert same(seen[:2], [a, b])


def test_errors_of_compiled_code_are_those_of_the_layer(block):
    compiled = torch.compile(block.experts, fullgraph=True, backend="aot_eager")
    [x], [idx], [router] = inputs(world=1)
    with torch.no_grad():
        with pytest.raises(ValueError, match="topk_weights has dtype torch.float64"):
            compiled(x, idx, router.double())
        with pytest.raises(ValueError, match=r"topk_idx\[0, 0\] = 8 on rank 0"):
            compiled(x, torch.full_like(idx, E), router)


def test_compiled_code_of_a_layer_that_is_gone_says_so():
    moe = loaded(world=1)
    number = moe._number
    del moe
    gc.collect()
    [x], [idx], [router] = inputs(world=1)
    with pytest.raises(ValueError, match=f"layer {number} of this process is gone"):
        torch.ops.megamoe.forward([x], [idx], [router], [], [x.clone()], [], number)


def test_fake_tensors_and_export(block):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = block.experts(
            mode.from_tensor(tokens()),
            torch.zeros(T, K, dtype=torch.int64),
            torch.zeros(T, K),
        )
    assert y.shape == (T, H) and y.dtype == torch.bfloat16
    with torch.no_grad():
        exported = torch.export.export(block, (tokens(),))
        assert "megamoe.forward" in str(exported.graph)
        assert torch.equal(exported.module()(tokens(1)), block(tokens(1)))


def test_the_operator_is_declared_right(block):
    """torch's own checks of an operator: schema, what is mutated, fake tensors, autograd."""
    [x], [idx], [router] = inputs(world=1)
    arguments = [x], [idx], [router], [], [torch.zeros_like(x)], [], block.experts._number
    torch.library.opcheck(torch.ops.megamoe.forward.default, arguments)
    torch.library.opcheck(
        torch.ops.megamoe.forward_only.default,
        (x, [x.float().requires_grad_()]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_construction_registers_one_number_a_layer():
    assert len({loaded(world=1)._number for _ in range(3)}) == 3
    assert isinstance(make(world=1), MegaMoE)


def test_a_layer_that_goes_between_launches_of_ranks_is_ended_with_the_next():
    """To wait for the GPU there would be to wait for a launch that is still to be made."""
    layers = [make(world=1) for _ in range(2)]
    ends: list = []
    for layer in layers:
        layer.backend.close = functools.partial(ends.append, layer.backend)
    first, second = (layer.backend for layer in layers)
    with streams.side_by_side():
        del layers[0], layer
        gc.collect()
        assert not ends
    layers[0].close()
    assert sorted(map(id, ends)) == sorted(map(id, (first, second)))
