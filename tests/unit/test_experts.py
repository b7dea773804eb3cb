"""The layer of an experts module: what is refused, which weights are read, how calls are cut."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import torch

import tests.experts
from megamoe import MegaMoE, quantize_weights, reference
from megamoe.custom_op import FORWARD_ONLY
from megamoe.integrations import experts
from megamoe.integrations.experts import FusedExperts, Options
from tests.experts import NAME
from tests.machine import max_relative_error
from tests.unit.layers import E, H, I, K, T, weights

NONE = E  # the id that names no expert


class Experts(tests.experts.Experts):
    def __init__(self, config: object = None, seed: int = 1, limit: float | None = None):
        given = weights(seed=seed)
        super().__init__(given.w13, given.w2, config, limit)


@pytest.fixture(autouse=True)
def options(monkeypatch):
    """Sets the options of the implementation, until the end of the test."""

    def set_to(**changes) -> Options:
        monkeypatch.setitem(experts.OPTIONS, NAME, Options(**({"max_tokens": T} | changes)))
        return experts.OPTIONS[NAME]

    set_to()
    return set_to


def arguments(tokens: int = T, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    idx = torch.rand(tokens, E, generator=rng).topk(K).indices
    router = torch.rand(tokens, K, generator=rng).bfloat16()
    return torch.randn(tokens, H, generator=rng).bfloat16(), idx, router


def check(module, y, x, idx, router, precision="bf16"):
    """y is what the weights that the module has now make of it."""
    given = module.gate_up_proj.detach(), module.down_proj.detach()
    if precision != "bf16":
        given = quantize_weights(*given, precision)
    idx = idx.masked_fill(idx >= E, -1)
    expected = reference.moe_forward(
        x, idx, router.float(), *given, precision=precision, clamp=module.limit
    )
    assert reference.relative_error(y, expected) <= max_relative_error(precision)


@pytest.fixture(scope="module")
def module() -> Experts:
    return Experts()


# --- calls


def test_weights_are_read_where_they_are_and_the_layer_is_kept(module):
    given = arguments()
    y = module(*given)
    check(module, y, *given)
    moe = experts.fused_of(module).moe
    assert moe.w13 is module.gate_up_proj and moe.w2 is module.down_proj
    module(*arguments(5))
    assert experts.fused_of(module).moe is moe
    check(module, y, *given)  # the first output is nobody's buffer
    assert not dict(module.named_children()).keys() - {"act_fn"}
    assert sorted(module.state_dict()) == ["down_proj", "gate_up_proj"]


@pytest.mark.parametrize("tokens", [T + 1, 2 * T + 1])
def test_more_tokens_than_a_launch_takes(module, tokens):
    given = arguments(tokens)
    check(module, module(*given), *given)


def test_launches_are_few_and_even():
    def sizes(tokens):
        return [
            len(range(tokens)[part]) for part in experts.parts_of(tokens, Options(max_tokens=T))
        ]

    assert sizes(1) == [1] and sizes(T) == [T] and sizes(T + 1) == [7, 6]
    assert sizes(3 * T) == [T, T, T] and sizes(2 * T + 1) == [9, 9, 7]
    group = Options(max_tokens=T, group=Group())
    assert (
        experts.parts_of(3 * T, group) == [slice(0, 3 * T)] and len(experts.parts_of(0, group)) == 1
    )


def test_ids_that_name_no_expert(module):
    x, idx, router = arguments(4)
    idx[0], idx[1, 0], idx[2, 1] = NONE, NONE, NONE + 3
    y = module(x, idx, router)
    check(module, y, x, idx, router)
    assert not y[0].any() and y[1].any()


def test_no_tokens(module):
    x, idx, router = arguments(0)
    assert module(x, idx, router).shape == (0, H)


def test_batches_and_strides(module):
    x, idx, router = arguments(6)
    expected = module(x, idx, router)
    batch = x.view(2, 3, H)
    assert torch.equal(module(batch, idx, router), expected.view(2, 3, H))
    strided = x.repeat(1, 2)[:, :H], idx.repeat(1, 2)[:, :K].int(), router.t().contiguous().t()
    assert torch.equal(module(*strided), expected)


def test_one_workspace_for_a_model_of_one_shape():
    config = types.SimpleNamespace()
    layers = Experts(config), Experts(config, seed=2, limit=1.0), Experts(seed=3)
    given = arguments(5)
    for layer in layers:
        check(layer, layer(*given), *given)
    moes = [experts.fused_of(layer).moe for layer in layers]
    assert moes[0].workspace is moes[1].workspace is not moes[2].workspace
    assert [moe.activation_clamp for moe in moes] == [None, 1.0, None]


def test_a_copy_has_a_layer_of_its_own(module):
    given = arguments()
    first = module(*given)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.down_proj.mul_(2)
    check(twin, twin(*given), *given)
    assert torch.equal(module(*given), first)
    assert experts.fused_of(twin) is not experts.fused_of(module)


def test_layers_end_with_their_module():
    layer = Experts()
    layer(*arguments())
    number, workspace = id(layer), weakref.ref(experts.fused_of(layer).moe.workspace)
    del layer
    gc.collect()
    assert number not in experts._fused and workspace() is None


# --- other weights


def replace(module, w13, w2):
    module.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
    module.down_proj = torch.nn.Parameter(w2, requires_grad=False)


def move(module, w13, w2):
    module.gate_up_proj.data, module.down_proj.data = w13, w2


def load(module, w13, w2):
    module.load_state_dict({"gate_up_proj": w13, "down_proj": w2})


def assign(module, w13, w2):
    module.load_state_dict({"gate_up_proj": w13, "down_proj": w2}, assign=True)


def write(module, w13, w2):
    with torch.no_grad():
        module.gate_up_proj.copy_(w13)
        module.down_proj.copy_(w2)


def convert(module, w13, w2):
    write(module, w13, w2)
    module.to(torch.float32).to(torch.bfloat16)


CHANGES = [replace, move, load, assign, write, convert]


@pytest.mark.parametrize(
    "precision,change",
    [*(("bf16", change) for change in CHANGES), ("fp8_block", move), ("fp8_block", load)],
)
def test_changed_weights_are_never_stale(precision, change, options):
    options(precision=precision)
    layer, given = Experts(), arguments(5)
    check(layer, layer(*given), *given, precision)
    moe, other = experts.fused_of(layer).moe, weights(seed=7)
    change(layer, other.w13, other.w2)
    check(layer, layer(*given), *given, precision)
    assert experts.fused_of(layer).moe is moe


def test_uncounted_writes_are_seen_after_close(options):
    """Of quantised weights; in bfloat16 the kernel reads what is there."""
    layer, given, other = Experts(), arguments(5), weights(seed=7)
    layer(*given)
    layer.gate_up_proj.data.copy_(other.w13)
    check(layer, layer(*given), *given)
    options(precision="fp8_block")
    layer(*given)
    layer.down_proj.data.copy_(other.w2)
    experts.fused_of(layer).close()
    check(layer, layer(*given), *given, "fp8_block")


def test_weights_of_other_sizes_make_another_layer(options):
    layer, given = Experts(), arguments()
    layer(*given)
    options(max_tokens=T)  # the same again
    first = experts.fused_of(layer).moe
    check(layer, layer(*given), *given)
    assert experts.fused_of(layer).moe is not first
    layer.gate_up_proj = torch.nn.Parameter(layer.gate_up_proj[..., :128], requires_grad=False)
    with pytest.raises(ValueError, match=r"Experts.gate_up_proj has shape \[8, 256, 128\]"):
        layer(*given)


def test_quantised_weights_can_be_freed(options):
    options(precision="fp8_block", free_weights=True)
    layer, given = Experts(), arguments(5)
    twin = Experts()
    check(twin, layer(*given), *given, "fp8_block")
    assert not layer.gate_up_proj.numel() and not layer.down_proj.numel()
    given = arguments(5, seed=4)
    check(twin, layer(*given), *given, "fp8_block")
    with pytest.raises(ValueError, match="Experts has only the layer's weights"):
        experts.fused_of(layer).close()
    options()
    with pytest.raises(ValueError, match="free_weights=True has freed its weights"):
        layer(*given)
    with pytest.raises(ValueError, match="free_weights=True needs a group or a precision"):
        Options(free_weights=True)
    replace(layer, twin.gate_up_proj.data, twin.down_proj.data)
    check(twin, layer(*given), *given)


# --- a process per GPU, which a CPU has not


class Group:
    def size(self):
        return 2

    def rank(self):
        return 1


class Recorder:
    """In place of a MegaMoE."""

    def __init__(self, **settings):
        self.settings, self.calls = settings, []
        self.workspace, self.num_local_experts = Experts(), E // 2
        self.config = types.SimpleNamespace(num_experts=settings["num_experts"])

    def load_weights(self, *given, replace):
        self.given = given

    def __call__(self, x, idx, router, out):
        self.calls.append(len(x))


@pytest.mark.parametrize("free", [False, True])
def test_a_rank_has_its_slice_and_launches_once(free, options, monkeypatch):
    monkeypatch.setattr(experts, "MegaMoE", Recorder)
    group = Group()
    options(group=group, free_weights=free)
    layer, whole = Experts(), weights()
    for tokens in (0, 3, 2 * T):
        layer(*arguments(tokens))
    moe = experts.fused_of(layer).moe
    assert moe.settings["group"] is group and moe.settings["world"] is None
    assert moe.settings["num_experts"] == E and moe.calls == [0, 3, 2 * T]
    assert torch.equal(moe.given[0], whole.w13[E // 2 :])
    assert torch.equal(moe.given[1], whole.w2[E // 2 :])
    copied = moe.given[0].untyped_storage().nbytes() == moe.given[0].nbytes
    assert copied == free == (not layer.gate_up_proj.numel())
    layer = Experts()
    layer._is_expert_parallel = True
    with pytest.raises(ValueError, match="Experts._is_expert_parallel=True: with a group"):
        layer(*arguments())


# --- what is refused, before any launch


@pytest.fixture
def no_layer(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a layer was made")

    monkeypatch.setattr(experts, "MegaMoE", fail)


@pytest.mark.parametrize(
    "attribute,value,what",
    [
        ("has_gate", False, "experts with a gate"),
        ("has_bias", True, "experts without biases"),
        ("is_transposed", True, r"gate_up_proj \[E, 2I, H\] and down_proj \[E, H, I\]"),
        ("is_concatenated", False, "gate rows, then up rows"),
    ],
)
def test_other_layouts(no_layer, attribute, value, what):
    layer = Experts()
    setattr(layer, attribute, value)
    with pytest.raises(ValueError, match=f"^Experts.{attribute}={value}: .* supports only {what}"):
        layer(*arguments())
    if attribute == "has_gate":
        del layer.gate_up_proj
        with pytest.raises(ValueError, match="^Experts.has_gate=False: .* experts with a gate"):
            layer(*arguments())


def test_a_module_without_such_weights(no_layer):
    layer = Experts()
    del layer.down_proj
    with pytest.raises(ValueError, match="Experts has no gate_up_proj and down_proj"):
        layer(*arguments())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(no_layer, dtype):
    x, idx, router = arguments()
    layer = Experts()
    with pytest.raises(ValueError, match=f"hidden_states of {dtype}: .*dtype=torch.bfloat16"):
        layer(x.to(dtype), idx, router)
    layer.to(dtype)
    with pytest.raises(ValueError, match=f"gate_up_proj has dtype {dtype}: .*dtype=torch.bfloat16"):
        layer(x, idx, router)


@pytest.mark.parametrize("hidden,inner", [(192, 128), (128, 64)])
def test_sizes_that_are_no_multiples_of_128(no_layer, hidden, inner):
    layer = Experts()
    replace(
        layer,
        torch.zeros(E, 2 * inner, hidden, dtype=torch.bfloat16),
        torch.zeros(E, hidden, inner, dtype=torch.bfloat16),
    )
    with pytest.raises(
        ValueError, match=rf"down_proj has shape .*multiples of 128, here H={hidden}"
    ):
        layer(*arguments())


def test_more_choices_than_the_layer_has(no_layer):
    x = arguments()[0]
    with pytest.raises(ValueError, match="^Experts: top_k=17"):
        Experts()(x, torch.zeros(T, 17, dtype=torch.int64), torch.zeros(T, 17))


class Other(Experts):
    """With a gate that the layer does not have."""

    def __init__(self, gate):
        super().__init__(limit=2.0)
        self.gate = gate

    def _apply_gate(self, pairs):
        return self.gate(*pairs.chunk(2, dim=-1))


@pytest.mark.parametrize(
    "gate",
    [
        lambda g, u: torch.nn.functional.gelu(g) * u,
        lambda g, u: g * torch.sigmoid(1.702 * g) * u,
        lambda g, u: torch.nn.functional.silu(g) * (u + 1),
        lambda g, u: torch.nn.functional.silu(u) * g,
        lambda g, u: torch.nn.functional.silu(g.clamp(max=2.0)) * u,  # up is not clamped
        lambda g, u: torch.nn.functional.silu(g.clamp(max=3.0)) * u.clamp(-3.0, 3.0),
        lambda g, u: g[:, :4],
    ],
)
def test_other_activations(no_layer, gate):
    with pytest.raises(
        ValueError, match="^Other._apply_gate with act_fn=SiLU.*supports only SwiGLU"
    ):
        Other(gate)(*arguments())


def test_a_gate_that_cannot_be_asked(no_layer):
    def gate(g, u):
        raise RuntimeError("no")

    with pytest.raises(ValueError, match="^Other._apply_gate cannot be asked .*: no"):
        Other(gate)(*arguments())


@pytest.mark.parametrize("limit", [0.4, 7.0, 100.0, 1e5])
def test_the_clamp_is_found(limit):
    layer = Experts(limit=limit)
    layer.alpha, layer.jitter, layer.flag = 1.5, 0.0, True
    assert experts.clamp_of(layer, I, torch.device("cpu")) == limit


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_wrong_options(value):
    with pytest.raises(ValueError, match=f"max_tokens={value!r} must be an integer >= 1"):
        Options(max_tokens=value)
    with pytest.raises(ValueError, match="precision='fp7'"):
        Options(precision="fp7")


def test_nothing_is_made_while_a_graph_is_captured(monkeypatch):
    layer = FusedExperts(module := Experts())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    with pytest.raises(RuntimeError, match="Experts has no layer .* run the model once before"):
        layer._refuse_in_capture(on_gpu)
    layer._refuse_in_capture(module.gate_up_proj)


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_other_weights_while_a_graph_is_captured(precision, options, monkeypatch):
    """Such that are read where they are need nothing but their address."""

    def refuse(self, w13):
        raise RuntimeError("captured")

    options(precision=precision)
    layer, given, other = Experts(), arguments(5), weights(seed=7)
    layer(*given)
    monkeypatch.setattr(FusedExperts, "_refuse_in_capture", refuse)
    move(layer, other.w13, other.w2)
    if precision == "bf16":
        check(layer, layer(*given), *given)
    else:
        with pytest.raises(RuntimeError, match="captured"):
            layer(*given)


# --- autograd and tracers


def test_gradients_are_an_error():
    layer, (x, idx, router) = Experts(), arguments()
    layer.gate_up_proj.requires_grad_()
    y = layer(x, idx, router)
    check(layer, y.detach(), x, idx, router)
    with pytest.raises(RuntimeError, match=FORWARD_ONLY[:40]):
        y.float().sum().backward()
    x.requires_grad_()
    layer.gate_up_proj.requires_grad_(False)
    with pytest.raises(RuntimeError, match=FORWARD_ONLY[:40]):
        layer(x, idx, router).float().sum().backward()
    with torch.no_grad():
        assert not layer(x, idx, router).requires_grad


@pytest.fixture
def forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_in_one_graph(forget_compiled, backend, warm):
    """Also where the first call is a compiled one, with other weights later, and for a copy."""
    layer, given = Experts(), arguments(4)
    if warm:
        layer(*given)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        check(layer, compiled(*given), *given)
        assert experts.fused_of(layer).moe.w13 is layer.gate_up_proj
        other = weights(seed=7)
        for change in (write, move):
            change(layer, other.w13 * 2, other.w2)
            check(layer, compiled(*given), *given)
        longer = arguments(T + 1)
        check(layer, compiled(*longer), *longer)
        twin = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=backend)
        move(twin, weights().w13, weights().w2)
        check(twin, twin(*given), *given)
        check(layer, compiled(*given), *given)


def test_a_compiled_layer_gives_no_gradient(forget_compiled):
    layer, given = Experts(), arguments()
    layer.down_proj.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(*given)
    check(layer, y.detach(), *given)
    with pytest.raises(RuntimeError, match=FORWARD_ONLY[:40]):
        y.float().sum().backward()


def test_fake_tensors(module):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, idx, router = (mode.from_tensor(t) for t in arguments())
        assert module(x, idx, router).shape == (T, H)


def test_it_is_the_layer_of_the_project(module):
    module(*arguments())
    assert isinstance(experts.fused_of(module).moe, MegaMoE)
