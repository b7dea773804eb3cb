"""Models of transformers whose experts the layer runs, beside transformers' own implementations.

Every experts module of a model is asked alone, with the arguments that it has in the model: against
its own loop in float32 the layer may err as much as the better of eager and `grouped_mm`, which err
by 0.0037 to 0.0048, the layer by 0.0030. Logits of the whole model may differ from eager's by
MAX_DIFFERENCE, that is four roundings to BF16: the layer's do by 0.0078 to 0.0091, those of
`grouped_mm`, where they are not the same, by 0.0064 to 0.0076.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.unit.layers import E, H, I, K, T

pytest.importorskip("transformers", reason="needs transformers: pip install '.[test]'")

import transformers  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from megamoe.integrations import experts  # noqa: E402
from megamoe.integrations import transformers as integration  # noqa: E402

MAX_DIFFERENCE = 2**-6
VOCABULARY = 64

COMMON = dict(
    hidden_size=H,
    num_experts_per_tok=K,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=VOCABULARY,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=0,
)
HEADS = dict(num_key_value_heads=2, head_dim=64)
GROUPS = dict(
    n_routed_experts=E,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=0,
    n_shared_experts=1,
    moe_intermediate_size=I,
    intermediate_size=I,
    routed_scaling_factor=2.5,
)
FAMILIES = {
    "DeepseekV3": dict(
        **GROUPS,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
    ),
    "DeepseekV4": dict(  # one layer routes by token id, one by top-k; both clamp
        n_routed_experts=E,
        moe_intermediate_size=I,
        swiglu_limit=0.5,
        mlp_layer_types=["hash_moe", "moe"],
        num_key_value_heads=1,
        head_dim=64,
        q_lora_rank=32,
        o_lora_rank=32,
        o_groups=2,
        index_n_heads=2,
        index_head_dim=32,
    ),
    "Qwen3Moe": dict(**HEADS, num_experts=E, moe_intermediate_size=I, norm_topk_prob=True),
    "Glm4Moe": dict(**HEADS, **GROUPS),
    "MiniMaxM2": dict(**HEADS, num_local_experts=E, intermediate_size=I, rotary_dim=32),
}


def config_of(family: str, **changes):
    kind = getattr(transformers, f"{family}Config")
    return kind(**(COMMON | FAMILIES.get(family, {}) | changes))


def model_of(family: str, dtype: torch.dtype = torch.bfloat16, **changes):
    """With random weights, and what a new model leaves empty: hash routes and router biases."""
    torch.manual_seed(len(family))
    made = transformers.AutoModelForCausalLM.from_config(
        config_of(family, **changes), dtype=dtype, experts_implementation="megamoe"
    )
    for name, buffer in made.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.rand(len(buffer), E).topk(K).indices)
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return made.eval()


@pytest.fixture(scope="module", autouse=True)
def small_launches(one_thread):
    """A prompt takes two of them."""
    integration.configure(max_tokens=T)
    yield
    integration.configure()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def qwen():
    return model_of("Qwen3Moe")


def prompt(length: int = 7, batch: int = 2, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=rng)


def experts_of(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "gate_up_proj")]


@torch.no_grad()
def logits(model, implementation: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    return model(ids, use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
def test_experts_err_no_more_than_those_of_transformers(model):
    calls = []
    hooks = [
        module.register_forward_hook(lambda module, given, _: calls.append((module, given)))
        for module in experts_of(model)
    ]
    logits(model, "eager", prompt())
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2
    for module, (x, idx, weights) in calls:
        exact = copy.deepcopy(module).float()
        exact.config._experts_implementation = "eager"
        expected = exact(x.float(), idx, weights.float())
        errors = {}
        for implementation in ("eager", "grouped_mm", "megamoe"):
            model.set_experts_implementation(implementation)
            errors[implementation] = difference(module(x, idx, weights), expected)
        print(type(module).__name__, errors)
        assert 0 < errors["megamoe"] <= min(errors["eager"], errors["grouped_mm"]), errors


def test_logits_are_those_of_its_own_experts(model):
    ids = prompt()
    own, grouped, found = (logits(model, name, ids) for name in ("eager", "grouped_mm", "megamoe"))
    print(type(model).__name__, difference(grouped, own), difference(found, own))
    assert 0 < difference(found, own) <= MAX_DIFFERENCE
    assert difference(grouped, own) <= MAX_DIFFERENCE  # the bound is not one of this layer


@torch.no_grad()
def test_the_same_tokens_are_generated(model):
    """As long as the two largest logits differ by more than those of two implementations do."""
    ids, made = prompt(batch=1, seed=3), {}
    own, found = logits(model, "eager", ids), logits(model, "megamoe", ids)
    rounding = 2 * (own.float() - found.float()).abs().max()
    for implementation in ("megamoe", "eager"):
        model.set_experts_implementation(implementation)
        made[implementation] = model.generate(ids, max_new_tokens=5, do_sample=False)[0]
    compared = 0
    for at in range(ids.shape[1], len(made["eager"])):
        first, second = logits(model, "eager", made["eager"][None, :at])[0, -1].topk(2).values
        if first - second > rounding:
            assert made["megamoe"][at] == made["eager"][at]
            compared += 1
        elif made["megamoe"][at] != made["eager"][at]:
            break
    assert compared >= 2


def test_one_layer_for_each_module_on_one_workspace(model):
    logits(model, "megamoe", prompt())
    modules, moes = experts_of(model), integration.layers_of(model)
    assert len(moes) == len(modules) == 2 and moes[0].workspace is moes[1].workspace
    clamp = 0.5 if "DeepseekV4" in type(model).__name__ else None
    for module, moe in zip(modules, moes, strict=True):
        assert moe.w13 is module.gate_up_proj and moe.w2 is module.down_proj
        assert moe.activation_clamp == clamp
        moe.synchronize()
    logits(model, "megamoe", prompt())
    assert integration.layers_of(model) == moes


def test_it_is_chosen_at_construction_and_later(qwen):
    assert model_of("Qwen3Moe").config._experts_implementation == "megamoe"
    for name in ("eager", "megamoe"):
        qwen.set_experts_implementation(name)
        assert qwen.config._experts_implementation == name


# --- other weights


@pytest.mark.parametrize("how", ["load_state_dict", "assign", "to", "in place"])
def test_changed_weights_are_never_stale(how):
    model, other, ids = model_of("Qwen3Moe"), model_of("Qwen3Moe", initializer_range=0.2), prompt()
    stale = logits(model, "megamoe", ids)
    if how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif how == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif how == "to":
        with torch.no_grad():
            experts_of(model)[0].gate_up_proj.mul_(2)
        model.to(torch.float32).to(torch.bfloat16)
    else:
        with torch.no_grad():
            experts_of(model)[1].down_proj.mul_(-1)
    expected = logits(model, "eager", ids)
    assert difference(stale, expected) > 4 * MAX_DIFFERENCE
    assert difference(logits(model, "megamoe", ids), expected) <= MAX_DIFFERENCE


def test_a_copied_model_has_layers_of_its_own(qwen):
    ids = prompt()
    first = logits(qwen, "megamoe", ids)
    twin = copy.deepcopy(qwen)
    for module in experts_of(twin):
        module.down_proj.data.mul_(-1)
    found = logits(twin, "megamoe", ids)
    assert difference(found, logits(twin, "eager", ids)) <= MAX_DIFFERENCE
    assert torch.equal(logits(qwen, "megamoe", ids), first)
    moes = integration.layers_of(twin)
    assert moes[0].workspace is not integration.layers_of(qwen)[0].workspace
    integration.release(twin)
    assert not integration.layers_of(twin) and integration.layers_of(qwen)
    assert torch.equal(logits(twin, "megamoe", ids), found)


# --- options


def test_names_with_options_of_their_own(qwen, monkeypatch):
    ids = prompt(5)
    plain = logits(qwen, "megamoe", ids)
    monkeypatch.setattr(experts, "OPTIONS", dict(experts.OPTIONS))
    try:
        integration.configure("megamoe_fp8", precision="fp8_block", max_tokens=T)
        coarse = logits(qwen, "megamoe_fp8", ids)
        assert {moe.config.precision for moe in integration.layers_of(qwen)} == {"fp8_block"}
        # FP8 of weights and tokens errs by 0.065 in a layer
        assert 2 * MAX_DIFFERENCE < difference(coarse, plain) < 0.15
        assert torch.equal(logits(qwen, "megamoe", ids), plain)
    finally:
        del ALL_EXPERTS_FUNCTIONS["megamoe_fp8"]


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_names_of_transformers_are_refused(name):
    with pytest.raises(ValueError, match=f"name='{name}' is an implementation of transformers"):
        integration.configure(name)


# --- what the layer is not


def test_gradients_are_an_error(qwen):
    qwen.set_experts_implementation("megamoe")
    with pytest.raises(RuntimeError, match="MegaMoE is forward only"):
        qwen(prompt(3), labels=prompt(3)).loss.backward()


REFUSED = {
    "another dtype": ("Qwen3Moe", dict(dtype=torch.float16), "Experts got hidden_states of .*16"),
    "an activation": ("Qwen3Moe", dict(hidden_act="gelu"), r"Qwen3MoeExperts._apply_gate .*GELU"),
    "a small size": (
        "Qwen3Moe",
        dict(moe_intermediate_size=96),
        "Qwen3MoeExperts.down_proj has shape .*multiples of 128, here H=256, I=96",
    ),
    "gpt-oss": (
        "GptOss",
        dict(**HEADS, num_local_experts=E, intermediate_size=H),
        "GptOssExperts.has_bias=True: megamoe supports only experts without biases",
    ),
}


@pytest.mark.parametrize("family,changes,what", REFUSED.values(), ids=REFUSED)
def test_other_models_are_refused_before_any_launch(family, changes, what, monkeypatch):
    monkeypatch.setattr(experts, "MegaMoE", None)
    model = model_of(family, **changes)
    with pytest.raises(ValueError, match=what):
        logits(model, "megamoe", prompt(3))


# --- compiled


def test_a_compiled_model_is_one_graph():
    """Also where the first call of all is compiled."""
    torch._dynamo.reset()
    model, ids = model_of("Qwen3Moe"), prompt(5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(ids, use_cache=False).logits
    assert len(integration.layers_of(model)) == 2
    assert difference(found, logits(model, "eager", ids)) <= MAX_DIFFERENCE
    torch._dynamo.reset()
