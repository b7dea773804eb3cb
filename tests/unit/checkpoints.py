"""Small checkpoints for tests: random experts in every format, written as safetensors files.

An expert's matrices are random bits where any are legal. `Tensors` are the names of a model and
what went in; `expected` says what a layer of its own precision should hold of them. `Holder` is
such a layer without a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamoe.config import MoEConfig
from megamoe.precision import precision_of
from megamoe.reference import Weights
from megamoe.residents import ResidentWeights
from megamoe.weights import empty_weights

E, K, H, I = 4, 2, 128, 128  # noqa: E741
LAYER = 3
Tensors = dict[str, torch.Tensor]


def e4m3(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Random bits but for NaN."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    bits[(bits & 127) == 127] = 0
    return bits.view(torch.float8_e4m3fn)


def bf16(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=rng).bfloat16()


def scales(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=rng) + 0.5


def exponents(rng: torch.Generator, *shape: int, spread: int = 8) -> torch.Tensor:
    bits = torch.randint(120, 120 + spread, shape, dtype=torch.uint8, generator=rng)
    return bits.view(torch.float8_e8m0fnu)


def random_bytes(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)


@dataclass(frozen=True)
class Format:
    """How a model's checkpoint stores a matrix [N, K]: suffix -> tensor, and what the layer's
    weights are of it: (values, scales or None).
    """

    prefix: str
    parts: tuple[str, str, str]  # of gate, up, down
    precision: str
    stored: Callable[[torch.Generator, int, int], Tensors]
    held: Callable[[Tensors], tuple[torch.Tensor, torch.Tensor | None]]
    config: dict = field(default_factory=dict)

    def name(self, expert: int, part: int, suffix: str, layer: int = LAYER) -> str:
        return f"{self.prefix.format(layer)}{expert}.{self.parts[part]}.{suffix}"


PROJ = ("gate_proj", "up_proj", "down_proj")
W123 = ("w1", "w3", "w2")
MLP = "model.layers.{}.mlp.experts."


def _bf16(rng, n, k):
    return {"weight": bf16(rng, n, k)}


def _fp8(scale: str, dtype=torch.float32):
    def stored(rng, n, k):
        shape = -(-n // 128), -(-k // 128)
        own = (
            scales(rng, *shape).to(dtype)
            if dtype != torch.float8_e8m0fnu
            else exponents(rng, *shape)
        )
        return {"weight": e4m3(rng, n, k), scale: own}

    return stored


def _fp8_channel(rng, n, k):
    return {"weight": e4m3(rng, n, k), "weight_scale": scales(rng, n, 1).bfloat16()}


def _deepseek_v4(rng, n, k):
    codes = random_bytes(rng, n, k // 2).view(torch.int8)
    return {"weight": codes, "scale": exponents(rng, n, k // 32)}


def _mxfp4_packed(rng, n, k):
    scale = exponents(rng, n, k // 32).view(torch.uint8)
    return {"weight_packed": random_bytes(rng, n, k // 2), "weight_scale": scale}


def _int4_packed(group: int):
    """value + 8, eight values in an int32, the first in its lowest bits; no -8."""

    def stored(rng, n, k):
        values = torch.randint(-7, 8, (n, k), generator=rng)
        words = ((values + 8).view(n, k // 8, 8) << (4 * torch.arange(8))).sum(-1)
        return {
            "weight_packed": words.to(torch.int32),
            "weight_scale": scales(rng, n, k // group).bfloat16(),
            "weight_shape": torch.tensor([n, k]),
        }

    return stored


def _as_it_is(weight: str = "weight", scale: str | None = None):
    def held(tensors):
        values, own = tensors[weight], tensors[scale] if scale else None
        if values.dtype == torch.int8:
            values = values.view(torch.uint8)
        if own is not None and values.dtype == torch.uint8:
            own = own.view(torch.uint8)
        elif own is not None:
            own = own.float()
        return values, own

    return held


def _channels(tensors):
    return tensors["weight"], tensors["weight_scale"][:, 0].float()


def _twos_complement(tensors):
    words = tensors["weight_packed"].unsqueeze(-1)
    values = ((words >> (4 * torch.arange(8))) & 15).flatten(-2) - 8
    nibbles = (values & 15).to(torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, tensors["weight_scale"].float()


FORMATS = {
    "deepseek_v3": Format(
        MLP, PROJ, "fp8_block", _fp8("weight_scale_inv"), _as_it_is(scale="weight_scale_inv"),
        {"n_routed_experts": E, "moe_intermediate_size": I, "intermediate_size": 999},
    ),
    "deepseek_v4": Format(
        "layers.{}.ffn.experts.", W123, "fp8_mxfp4", _deepseek_v4, _as_it_is(scale="scale"),
        {"n_routed_experts": E, "moe_intermediate_size": I, "swiglu_limit": 10.0},
    ),
    "deepseek_v4_base": Format(
        "layers.{}.ffn.experts.", W123, "fp8_block", _fp8("scale", torch.float8_e8m0fnu),
        _as_it_is(scale="scale"), {"n_routed_experts": E, "moe_intermediate_size": I},
    ),
    "qwen3_moe": Format(
        MLP, PROJ, "bf16", _bf16, _as_it_is(),
        {"num_experts": E, "moe_intermediate_size": I, "hidden_act": "silu"},
    ),
    "glm4_moe_fp8": Format(
        MLP, PROJ, "fp8_channel", _fp8_channel, _channels,
        {"n_routed_experts": E, "moe_intermediate_size": I},
    ),
    "minimax_m2": Format(
        "model.layers.{}.block_sparse_moe.experts.", W123, "fp8_block", _fp8("weight_scale_inv"),
        _as_it_is(scale="weight_scale_inv"), {"num_local_experts": E, "intermediate_size": I},
    ),
    "mxfp4_packed": Format(
        "language_model.model.layers.{}.mlp.experts.", PROJ, "fp8_mxfp4", _mxfp4_packed,
        _as_it_is("weight_packed", "weight_scale"),
        {"text_config": {"n_routed_experts": E, "moe_intermediate_size": I}},
    ),
    "int4_packed": Format(
        MLP, PROJ, "fp8_int4", _int4_packed(128), _twos_complement,
        {"n_routed_experts": E, "moe_intermediate_size": I},
    ),
}  # fmt: skip
KIMI_K2_THINKING = Format(MLP, PROJ, "fp8_int4", _int4_packed(32), _twos_complement)


def tensors_of(form: Format, layers=(LAYER,), experts=E, hidden=H, inner=I, seed=0) -> Tensors:
    """A model's tensors, those of attention and of shared experts included."""
    rng = torch.Generator().manual_seed(seed)
    found: Tensors = {"model.layers.3.self_attn.q_proj.weight": bf16(rng, 128, 128)}
    found["model.layers.3.mlp.shared_experts.gate_proj.weight"] = bf16(rng, 128, 128)
    found["mtp.0.ffn.experts.0.w1.weight"] = bf16(rng, 128, 128)
    for layer in layers:
        for expert in range(experts):
            for part, (n, k) in enumerate(((inner, hidden), (inner, hidden), (hidden, inner))):
                for suffix, tensor in form.stored(rng, n, k).items():
                    found[form.name(expert, part, suffix, layer)] = tensor
    return found


def expected(form: Format, tensors: Tensors, layer=LAYER, experts=E) -> Weights:
    """All experts as a layer of the format's precision takes them."""
    matrices = []
    for parts in ((0, 1), (2,)):
        rows = []
        for expert in range(experts):
            own = []
            for part in parts:
                prefix = form.name(expert, part, "", layer)
                found = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
                own.append(form.held(found))
            rows.append([None if t[0] is None else _joined(t) for t in zip(*own, strict=True)])
        matrices.append([None if t[0] is None else _stacked(t) for t in zip(*rows, strict=True)])
    (w13, w13_scale), (w2, w2_scale) = matrices
    return Weights(w13, w2, w13_scale, w2_scale)


def _joined(tensors) -> torch.Tensor:
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(tensors[0].dtype)


def _stacked(tensors) -> torch.Tensor:
    return torch.stack([t.view(torch.uint8) for t in tensors]).view(tensors[0].dtype)


def fused(weights: Weights, layer: int = LAYER) -> Tensors:
    """Matrices of all experts in one tensor, as transformers has them."""
    prefix = MLP.format(layer)
    found = {f"{prefix}gate_up_proj": weights.w13, f"{prefix}down_proj": weights.w2}
    if weights.w13_scale is not None and weights.w2_scale is not None:
        found |= {
            f"{prefix}gate_up_proj_scale_inv": weights.w13_scale,
            f"{prefix}down_proj_scale_inv": weights.w2_scale,
        }
    return found


def filled(precision: str, seed: int = 0) -> Weights:
    """Weights of random bits in the layout of a checkpoint."""
    weights = empty_weights(precision_of(precision), E, H, I, "cpu")
    rng = torch.Generator().manual_seed(seed)
    for tensor in weights.present:
        draw = e4m3 if tensor.element_size() == 1 else scales
        tensor.copy_(draw(rng, *tensor.shape))
    return weights


def write(directory: Path, tensors: Tensors, config: dict | None = None, shards: int = 1) -> Path:
    """A checkpoint; with several shards experts are spread over them."""
    from safetensors.torch import save_file

    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        files = [f"model-{at + 1:05}-of-{shards:05}.safetensors" for at in range(shards)]
        place = {name: files[at % shards] for at, name in enumerate(names)}
        for file in files:
            save_file({n: tensors[n] for n in names if place[n] == file}, directory / file)
        index = {"metadata": {"total_size": 0}, "weight_map": place}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        text = {"num_experts_per_tok": K, "hidden_size": H} | config.get("text_config", config)
        values = {"text_config": text} if "text_config" in config else text
        (directory / "config.json").write_text(json.dumps(values))
    return directory


def split(form: Format, weights: Weights, scale: str | None = None, layer: int = LAYER) -> Tensors:
    """Tensors of single experts of weights in their layout; `scale`: suffix of the scales."""
    found: Tensors = {}
    for suffix, w13, w2 in (
        ("weight", weights.w13, weights.w2),
        (scale, weights.w13_scale, weights.w2_scale),
    ):
        for expert, matrix in enumerate([] if suffix is None or w13 is None else w13):
            gate, up = matrix.chunk(2)
            for part, tensor in enumerate((gate, up, w2[expert])):
                found[form.name(expert, part, suffix, layer)] = tensor.contiguous().clone()
    return found


class Holder(ResidentWeights):
    """What a rank of a layer has of weights, without a kernel."""

    def __init__(self, precision: str, rank=0, world=1, clamp=None, experts=E, device="cpu"):
        super().__init__()
        self.config = MoEConfig(experts, K, H, I, 8, world, precision)
        self.device, self.activation_clamp = torch.device(device), clamp
        self.num_local_experts = self.config.local_experts
        self.first_local_expert = rank * self.num_local_experts
        self.reads = 0
        self._declare()

    def _read(self, weights, tables) -> None:
        self.reads += 1


def same(held: Weights, wanted: Weights) -> bool:
    """Bit for bit."""
    for a, b in zip(held, wanted, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and (a.dtype != b.dtype or a.shape != b.shape):
            return False
        if a is not None and not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True
