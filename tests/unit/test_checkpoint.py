"""Experts of checkpoints in layers: every format bit for bit, what is read, every refusal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe import MegaMoE, quantize_weights
from megamoe.checkpoint import Checkpoint, CheckpointError, files
from megamoe.fourbit import dequantize, to_fp8_block
from megamoe.precision import PRECISIONS
from megamoe.reference import Weights, relative_error
from megamoe.weights import pack_weights
from tests.machine import max_relative_error
from tests.nights import built
from tests.unit import layers
from tests.unit.checkpoints import (
    FORMATS,
    KIMI_K2_THINKING,
    LAYER,
    MLP,
    E,
    H,
    Holder,
    I,
    K,
    Tensors,
    bf16,
    expected,
    exponents,
    filled,
    fused,
    same,
    split,
    tensors_of,
    write,
)

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")

QWEN3, V3, V4 = FORMATS["qwen3_moe"], FORMATS["deepseek_v3"], FORMATS["deepseek_v4"]


def load(path: Path, precision: str, **arguments):
    """(the layer, what was said of the load)"""
    moe = Holder(precision, **arguments)
    return moe, Checkpoint(path).load(moe, LAYER)


def holds(moe: Holder, wanted: Weights) -> bool:
    """True if the layer holds these, 4-bit weights as the kernel reads them."""
    if moe.config.recipe.weights.packed:
        wanted, changed = pack_weights(wanted)
        assert moe.requantized_groups == changed
    return same(moe._held(), wanted)


# --- every format


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_format_arrives_bit_for_bit(tmp_path, name, shards):
    form = FORMATS[name]
    tensors = tensors_of(form, layers=(LAYER, 5))
    checkpoint = Checkpoint(write(tmp_path, tensors, form.config, shards))
    assert checkpoint.layers == [LAYER, 5]
    arguments = checkpoint.moe_arguments()
    clamp = form.config.get("swiglu_limit")
    assert arguments == {
        "num_experts": E,
        "top_k": K,
        "hidden_size": H,
        "intermediate_size": I,
        "precision": form.precision,
        "activation_clamp": clamp,
    }
    for layer in checkpoint.layers:
        moe = Holder(form.precision, clamp=clamp)
        loaded = checkpoint.load(moe, layer)
        assert holds(moe, expected(form, tensors, layer))
        assert loaded.experts == range(E) and loaded.inexact_blocks == 0
        assert loaded.requantized_groups == moe.requantized_groups


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_tensors_of_all_experts_arrive_bit_for_bit(tmp_path, precision):
    given = filled(precision)
    moe, _ = load(write(tmp_path, fused(given)), precision)
    assert holds(moe, given)


def test_one_file_is_a_checkpoint_too(tmp_path):
    tensors = tensors_of(QWEN3)
    moe, _ = load(write(tmp_path, tensors) / "model.safetensors", "bf16")
    assert holds(moe, expected(QWEN3, tensors))


def test_a_description_says_what_is_there(tmp_path):
    path = write(tmp_path, tensors_of(V4, layers=(3, 4, 5, 9)), V4.config)
    said = Checkpoint(path).describe(4)
    for part in ("3..5, 9;", "layer 4: 4 experts as mxfp4", "hidden_size=128", "top_k=2",
                 "activation_clamp=10.0", "fp8_mxfp4, fp8_mxfp4_token, fp8_block"):  # fmt: skip
        assert part in said, said


# --- other precisions


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "bf16"])
def test_bf16_is_quantised(tmp_path, precision):
    tensors = tensors_of(QWEN3)
    moe, _ = load(write(tmp_path, tensors), precision)
    given = expected(QWEN3, tensors)
    assert holds(moe, quantize_weights(given.w13, given.w2, precision))


def test_mxfp4_with_a_scale_per_token(tmp_path):
    tensors = tensors_of(V4)
    moe, _ = load(write(tmp_path, tensors), "fp8_mxfp4_token")
    assert holds(moe, expected(V4, tensors))


def spread_out(tensors: Tensors, low: int) -> None:
    """One exponent of one expert far below the rest of its block."""
    name = V4.name(1, 2, "scale")
    tensors[name].view(torch.uint8)[5, 1] = low
    tensors[V4.name(1, 2, "weight")].view(torch.uint8)[5, 16:32] = 0x33


@pytest.mark.parametrize("low,inexact", [(120, 0), (90, 1)])
def test_mxfp4_becomes_fp8_block_and_what_does_not_is_counted(tmp_path, low, inexact):
    tensors = tensors_of(V4)
    spread_out(tensors, low)
    moe, loaded = load(write(tmp_path, tensors), "fp8_block")
    given = expected(V4, tensors)
    made = [to_fp8_block(given.w13, given.w13_scale), to_fp8_block(given.w2, given.w2_scale)]
    wanted = Weights(made[0].stored, made[1].stored, made[0].scale, made[1].scale)
    assert holds(moe, wanted)
    assert (loaded.inexact_blocks, loaded.num_blocks) == (inexact, E * 3)
    exact = dequantize(given.w2, given.w2_scale)
    held = moe.w2.float() * moe.w2_scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert torch.equal(held, exact) == (not inexact)


def test_rounded_groups_are_reported(tmp_path):
    tensors = tensors_of(V4)
    spread_out(tensors, 90)
    _, loaded = load(write(tmp_path, tensors), "fp8_mxfp4")
    assert loaded.requantized_groups == 1


@pytest.mark.parametrize(
    "name,precision,allowed",
    [
        ("deepseek_v3", "bf16", "'fp8_block'"),
        ("deepseek_v3", "fp8_mxfp4", "'fp8_block'"),
        ("glm4_moe_fp8", "fp8_block", "'fp8_channel'"),
        ("deepseek_v4", "bf16", "'fp8_mxfp4', 'fp8_mxfp4_token', 'fp8_block'"),
        ("deepseek_v4", "fp8_int4", "'fp8_mxfp4', 'fp8_mxfp4_token', 'fp8_block'"),
        ("int4_packed", "fp8_block", "'fp8_int4'"),
    ],
)
def test_other_pairs_are_refused_with_what_would_work(tmp_path, name, precision, allowed):
    path = write(tmp_path, tensors_of(FORMATS[name]))
    with pytest.raises(CheckpointError, match=rf"{precision}.*one of \[{allowed}\]"):
        load(path, precision)


# --- what is read, and where it goes


class Spy:
    """Counts the bytes of every part that is read, and the files that are open."""

    def __init__(self, monkeypatch):
        self.bytes, self.names, self.open = 0, set(), 0
        real = files.open_file

        def opened(path):
            return SpiedFile(self, real(path))

        monkeypatch.setattr(files, "open_file", opened)


class SpiedFile:
    def __init__(self, spy, file):
        self.spy, self.file = spy, file

    def __enter__(self):
        self.file.__enter__()
        self.spy.open += 1
        return self

    def __exit__(self, *error):
        self.spy.open -= 1
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return SpiedSlice(self.spy, name, self.file.get_slice(name))


class SpiedSlice:
    def __init__(self, spy, name, part):
        self.spy, self.name, self.part = spy, name, part
        self.get_dtype, self.get_shape = part.get_dtype, part.get_shape

    def __getitem__(self, at):
        tensor = self.part[at]
        self.spy.bytes += tensor.nbytes
        self.spy.names.add(self.name)
        return tensor


def bytes_of(weights: Weights) -> int:
    return sum(tensor.nbytes for tensor in weights.present)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "deepseek_v4"])
@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_experts_of_a_rank_are_read(tmp_path, monkeypatch, name, rank):
    form = FORMATS[name]
    tensors = tensors_of(form)
    path = write(tmp_path, tensors, shards=2)
    spy = Spy(monkeypatch)
    moe, loaded = load(path, form.precision, rank=rank, world=2)
    own = slice(2 * rank, 2 * rank + 2)
    wanted = expected(form, tensors).of(own)
    assert holds(moe, wanted) and loaded.experts == range(2 * rank, 2 * rank + 2)
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in spy.names}
    assert experts == set(loaded.experts)
    assert spy.bytes == bytes_of(wanted)


def test_of_tensors_of_all_experts_only_those_of_the_rank_are_read(tmp_path, monkeypatch):
    given = filled("fp8_block")
    path = write(tmp_path, fused(given))
    spy = Spy(monkeypatch)
    moe, _ = load(path, "fp8_block", rank=1, world=2)
    assert holds(moe, given.of(slice(2, 4)))
    assert spy.bytes == bytes_of(given.of(slice(2, 4)))


def mapped(path: Path) -> list[range]:
    """Addresses at which a file is mapped."""
    found = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in found if line[-1] == str(path)]
    return [range(int(begin, 16), int(end, 16)) for begin, end in spans]


@pytest.mark.parametrize("at", [None, 2])
def test_what_is_read_is_memory_of_the_file(tmp_path, at):
    path = write(tmp_path, fused(filled("fp8_block")))
    with files.Files(path).open() as reader:
        tensor = reader.read(f"{MLP.format(LAYER)}gate_up_proj", at)
        assert any(tensor.data_ptr() in span for span in mapped(path / "model.safetensors"))


def test_files_are_closed_after_a_load(tmp_path, monkeypatch):
    path = write(tmp_path, tensors_of(QWEN3), shards=2)
    spy = Spy(monkeypatch)
    moe, _ = load(path, "bf16")
    with pytest.raises(CheckpointError):
        load(path, "bf16", clamp=7.0)
    assert spy.open == 0 and spy.names
    assert not any(mapped(file) for file in path.iterdir())
    assert moe.w13.isfinite().all()


class Allocations(TorchDispatchMode):
    """Bytes of tensors that are no views: of all, and of the largest."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.untyped_storage().data_ptr() not in inputs:
                self.total += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
        return made


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_what_is_copied_needs_no_memory_but_its_place(tmp_path, name):
    form = FORMATS[name]
    path = write(tmp_path, tensors_of(form, experts=16))
    moe = Holder(form.precision, experts=16)
    with Allocations() as seen:
        Checkpoint(path).load(moe, LAYER)
    place = bytes_of(moe._held())
    assert place <= seen.total < place + 3 * H * I // 4


@pytest.mark.parametrize("name,precision", [("qwen3_moe", "fp8_block"), ("qwen3_moe", "fp8_mxfp4"),
                                            ("deepseek_v4", "fp8_mxfp4"),
                                            ("deepseek_v4", "fp8_block")])  # fmt: skip
def test_what_is_converted_needs_memory_for_one_expert(tmp_path, name, precision):
    """Nothing but the layer's own weights is as large as two experts of float32."""
    path = write(tmp_path, tensors_of(FORMATS[name], experts=16))
    moe = Holder(precision, experts=16)
    Checkpoint(path).load(moe, LAYER)
    places = [tensor.data_ptr() for tensor in moe._held().present]
    with Allocations() as seen:
        Checkpoint(path).load(moe, LAYER)
    assert seen.largest <= 2 * 4 * 2 * I * H
    assert [tensor.data_ptr() for tensor in moe._held().present] == places


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "deepseek_v4"])
def test_loading_again_writes_into_the_same_memory(tmp_path, name):
    """As captured graphs need it; scales of blocks are laid out anew."""
    form = FORMATS[name]
    paths = [tmp_path / str(seed) for seed in range(2)]
    given = [tensors_of(form, seed=seed) for seed in range(2)]
    for path, tensors in zip(paths, given, strict=True):
        path.mkdir()
        write(path, tensors)
    moe, _ = load(paths[0], form.precision)
    moe._captured = True
    before = [(n, t.data_ptr(), t.clone()) for n, t in moe.kernel_tensors()]
    version, reads = moe.weights_version, moe.reads
    with torch.inference_mode():
        Checkpoint(paths[1]).load(moe, LAYER)
    assert holds(moe, expected(form, given[1]))
    assert (moe.weights_version, moe._captured) == (version, True) and moe.reads > reads
    for (name, place, old), (_, new) in zip(before, moe.kernel_tensors(), strict=True):
        assert new.data_ptr() == place and not torch.equal(new, old), name


def test_weights_that_the_layer_was_given_are_written(tmp_path):
    """Parameters too, which stay what they are."""
    tensors = tensors_of(QWEN3)
    moe, w13 = Holder("bf16"), torch.nn.Parameter(torch.zeros(E, 2 * I, H).bfloat16())
    moe.load_weights(w13, torch.zeros(E, H, I).bfloat16())
    Checkpoint(write(tmp_path, tensors)).load(moe, LAYER)
    assert moe.w13 is w13 and w13.is_leaf and w13.requires_grad
    assert same(Weights(w13.detach(), moe.w2), expected(QWEN3, tensors))


def test_progress_is_for_a_terminal_and_the_first_rank(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    path = write(tmp_path, tensors_of(QWEN3))
    for stream, rank, shown in ((Terminal(), 0, True), (Terminal(), 1, False),
                                (io.StringIO(), 0, False)):  # fmt: skip
        monkeypatch.setattr(sys, "stderr", stream)
        load(path, "bf16", rank=rank, world=2)
        assert ("[2/2] layer 3, expert 1, 0 s so far" in stream.getvalue()) == shown
        assert stream.getvalue().endswith("\r" if shown else "")
        assert shown or not stream.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    load(path, "bf16")


# --- refusals


def refused(path: Path, match: str, precision: str = "bf16", **arguments) -> None:
    with pytest.raises(CheckpointError, match=match):
        load(path, precision, **arguments)


def test_a_directory_without_files(tmp_path):
    with pytest.raises(CheckpointError, match="has neither model.safetensors.index.json nor"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="absent.safetensors is missing"):
        Checkpoint(tmp_path / "absent.safetensors")


def test_a_checkpoint_without_experts(tmp_path):
    path = write(tmp_path, {"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="model.safetensors names no routed experts"):
        Checkpoint(path)


def test_a_layer_without_experts(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, tensors_of(QWEN3, layers=(3, 4, 5, 7))))
    with pytest.raises(CheckpointError, match=r"layer=2 has no .*in layers 3\.\.5, 7"):
        checkpoint.load(Holder("bf16"), 2)


@pytest.mark.parametrize("kept", [4, 60, -1])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_file_is_named(tmp_path, kept, shards):
    path = write(tmp_path, tensors_of(QWEN3), shards=shards)
    file = next(path.glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:kept])
    refused(path, f"{file.name} cannot be read, or is not complete")


def test_a_file_that_is_missing_is_named(tmp_path):
    path = write(tmp_path, tensors_of(QWEN3), shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    refused(path, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize(
    "text,match",
    [
        ("{", "index.json cannot be read"),
        ("[]", "holds no JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "places a in '../b.safetensors'"),
    ],
)
def test_a_damaged_index(tmp_path, text, match):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(tmp_path)


def test_a_tensor_that_only_the_index_has(tmp_path):
    path = write(tmp_path, tensors_of(QWEN3), shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = QWEN3.name(2, 1, "weight")
    index["weight_map"][name] = (
        "model-00001-of-00002.safetensors"
        if "2-of" in index["weight_map"][name]
        else "model-00002-of-00002.safetensors"
    )
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, rf"of-00002.safetensors has no tensor {name}")


def test_missing_experts_are_listed(tmp_path):
    tensors = tensors_of(QWEN3, experts=10)
    for expert in (1, 4, 5, 6, 8):
        for part in range(3):
            del tensors[QWEN3.name(expert, part, "weight")]
    refused(
        write(tmp_path, tensors),
        r"model.safetensors: layer 3 lacks experts 1, 4\.\.6, 8 of 10",
        experts=10,
    )


def test_missing_experts_at_the_end_are_known_from_the_configuration(tmp_path):
    tensors = tensors_of(QWEN3, experts=2)
    path = write(tmp_path, tensors, QWEN3.config)
    refused(path, r"layer 3 lacks experts 2\.\.3 of 4")
    (path / "config.json").unlink()
    refused(path, "num_experts=2, the layer 4")


@pytest.mark.parametrize("form", [QWEN3, V3], ids=["weight", "scale"])
def test_a_missing_tensor_is_named(tmp_path, form):
    tensors = tensors_of(form)
    suffix = "weight" if form is QWEN3 else "weight_scale_inv"
    del tensors[form.name(2, 1, suffix)]
    refused(write(tmp_path, tensors), f"no up {suffix} of expert 2", form.precision)


def test_a_first_expert_without_weights(tmp_path):
    tensors = tensors_of(QWEN3)
    del tensors[QWEN3.name(0, 0, "weight")]
    refused(write(tmp_path, tensors), "layer 3 has no gate weights of expert 0")


def changed(form, expert: int, part: int, suffix: str, tensor: torch.Tensor) -> Tensors:
    return tensors_of(form) | {form.name(expert, part, suffix): tensor}


RNG = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "form,expert,part,suffix,tensor,match",
    [
        (QWEN3, 2, 1, "weight", bf16(RNG, I, H + 1), r"shape \[128, 129\], expected \[128, 128\]"),
        (QWEN3, 2, 2, "weight", torch.zeros(H, I), "dtype F32, expected one of"),
        (QWEN3, 0, 0, "weight", torch.zeros(I, H), "dtype F32; supported are"),
        (QWEN3, 0, 0, "weight", bf16(RNG, I), r"has shape \[128\]"),
        (QWEN3, 2, 1, "bias", bf16(RNG, I), "is a bias"),
        (QWEN3, 2, 1, "input_scale", bf16(RNG, 1), "is unknown in bf16"),
        (QWEN3, 2, 1, "weight_zero_point", bf16(RNG, 1), "zero point"),
        (V3, 2, 0, "weight_scale_inv", torch.ones(2, 1), r"shape \[2, 1\], expected \[1, 1\]"),
        (V3, 2, 0, "weight_scale_inv", torch.ones(1, 1).half(), "dtype F16, expected one of"),
        (V3, 0, 0, "weight_scale_inv", torch.ones(1), r"F32 \[1\], and no scale .*\[1, 1\]"),
        (V3, 0, 0, "scale", torch.ones(1, 1), "is a second scale"),
        (V3, 2, 0, "weight", bf16(RNG, I, H), "dtype BF16, expected one of"),
        (V3, 2, 1, "weight_scale_inv", torch.full((1, 1), float("nan")), "of expert 2 that is not"),
        (V4, 2, 1, "scale", exponents(RNG, I, H // 16), r"\[128, 8\], expected \[128, 4\]"),
        (V4, 2, 1, "scale", torch.full((I, H // 32), 255, dtype=torch.uint8), "of expert 2 that"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, form, expert, part, suffix, tensor, match):
    path = write(tmp_path, changed(form, expert, part, suffix, tensor))
    name = form.name(expert, part, suffix)
    refused(path, f"model.safetensors: {name} .*{match}", form.precision)


def test_fp8_without_scales(tmp_path):
    tensors = {n: t for n, t in tensors_of(V3).items() if not n.endswith("_scale_inv")}
    refused(write(tmp_path, tensors), "F8_E4M3 has no scale: fp8_block has", "fp8_block")


def test_values_that_are_not_finite_are_not_quantised(tmp_path):
    weight = bf16(RNG, I, H)
    weight[3, 4] = float("inf")
    path = write(tmp_path, changed(QWEN3, 2, 1, "weight", weight))
    refused(path, f"{QWEN3.name(2, 1, 'weight')} has a value of expert 2", "fp8_block")
    moe, _ = load(path, "bf16")
    assert torch.isinf(moe.w13).any()


def test_an_unknown_name_is_named(tmp_path):
    name = f"{MLP.format(LAYER)}0.gate.weight"
    refused(write(tmp_path, tensors_of(QWEN3) | {name: torch.ones(1)}), f"{name} is unknown")


def test_a_bias_of_the_router_may_stand_there(tmp_path):
    tensors = tensors_of(QWEN3)
    name = f"{MLP.format(LAYER)}e_score_correction_bias"
    moe, _ = load(write(tmp_path, tensors | {name: torch.ones(E)}), "bf16")
    assert holds(moe, expected(QWEN3, tensors))


def test_a_layer_in_two_places(tmp_path):
    tensors = tensors_of(QWEN3)
    other = {f"language_{name}": tensor.clone() for name, tensor in tensors.items()}
    refused(write(tmp_path, tensors | other), "is unknown among routed experts, or there twice")


def test_tensors_of_one_and_of_all_experts(tmp_path):
    path = write(tmp_path, tensors_of(QWEN3) | fused(filled("bf16")))
    refused(path, "layer 3 has tensors of one expert and tensors of all")


def test_transposed_tensors_of_all_experts(tmp_path):
    given = filled("bf16")
    turned = Weights(*(t.transpose(1, 2).contiguous() for t in given.present))
    refused(write(tmp_path, fused(turned)), r"down_proj has shape \[4, 128, 128\].*transposed")


def test_gpt_oss_is_refused_with_what_is_unsupported(tmp_path):
    prefix = MLP.format(LAYER)
    tensors = {
        f"{prefix}{name}": torch.zeros(E, 2, dtype=torch.uint8)
        for name in ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias",
                     "down_proj_blocks", "down_proj_scales", "down_proj_bias")
    }  # fmt: skip
    refused(write(tmp_path, tensors), "gpt-oss.*interleaved, it has biases, and its activation")


def test_integers_with_groups_of_32_are_refused(tmp_path):
    path = write(tmp_path, tensors_of(KIMI_K2_THINKING))
    refused(path, r"BF16 \[128, 4\], and no scale .*per 1 x 128 values.*\[128, 1\]", "fp8_int4")


@pytest.mark.parametrize(
    "config,match",
    [
        ({"hidden_act": "situ"}, "hidden_act='situ'"),
        ({"swiglu_alpha": 1.702}, "swiglu_alpha=1.702"),
        ({"swiglu_limits": [7.0]}, "swiglu_limits="),
        ({"model_type": "minimax_m3_vl"}, "model_type='minimax_m3_vl' has another activation"),
    ],
)
def test_other_activations_are_refused(tmp_path, config, match):
    path = write(tmp_path, tensors_of(QWEN3), QWEN3.config | config)
    refused(path, f"config.json: {match}")
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(path).moe_arguments()


@pytest.mark.parametrize(
    "config,match",
    [
        ({"num_experts_per_tok": None}, "has no num_experts_per_tok"),
        ({"num_experts_per_tok": "8"}, "num_experts_per_tok='8' must be a positive integer"),
        ({"hidden_size": 256}, "says hidden_size=256, but tensors of layer 3 have 128"),
        ({"moe_intermediate_size": 64}, "says intermediate_size=64"),
        ({"num_experts": 3}, "says num_experts=3, but tensors of layer 3 have 4"),
        ({"swiglu_limit": "10"}, "swiglu_limit='10' must be a number"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path, config, match):
    path = write(tmp_path, tensors_of(QWEN3), QWEN3.config | config)
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(path).moe_arguments()


def test_a_layer_of_another_clamp_is_refused(tmp_path):
    path = write(tmp_path, tensors_of(V4), V4.config)
    refused(path, "activation_clamp=10.0, the layer None", "fp8_mxfp4")
    load(path, "fp8_mxfp4", clamp=10.0)


def test_layers_that_cannot_be_filled(tmp_path):
    path = write(tmp_path, tensors_of(QWEN3))
    with pytest.raises(ValueError, match="on device 'meta': call to_empty"):
        load(path, "bf16", device="meta")
    refused(path, "num_experts=4, the layer 8", experts=8)


def test_without_the_library(tmp_path, monkeypatch):
    path = write(tmp_path, tensors_of(QWEN3))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'megamoe\[checkpoint\]'"):
        Checkpoint(path)


def test_an_error_leaves_an_empty_layer_empty_and_a_loaded_one_whole(tmp_path):
    """Experts before the bad one are new, with their scales; those behind it are the old."""
    given = filled("fp8_block")
    tensors = changed(V3, 2, 2, "weight_scale_inv", torch.full((1, 1), float("inf")))
    path = write(tmp_path, tensors)
    moe = Holder("fp8_block")
    with pytest.raises(CheckpointError, match="not finite"):
        Checkpoint(path).load(moe, LAYER)
    with pytest.raises(ValueError, match="weights are not loaded"):
        moe.kernel_tensors()
    moe.load_weights(*(tensor.clone() for tensor in given))
    with pytest.raises(CheckpointError, match="not finite"):
        Checkpoint(path).load(moe, LAYER)
    new = expected(V3, tensors)
    assert same(moe._held().of(slice(0, 2)), new.of(slice(0, 2)))
    assert same(moe._held().of(3), given.of(3))
    tables = dict(moe.kernel_tensors())
    assert torch.equal(tables["w2_tile_scales"][:2, 0, :, 0], new.w2_scale[:2, 0])
    assert torch.equal(tables["w2_tile_scales"][3, 0, :, 0], given.w2_scale[3, 0])


# --- layers that run


@pytest.mark.parametrize("precision", built(["bf16", "fp8_block", "fp8_mxfp4"]))
def test_a_layer_runs_with_the_experts_of_a_checkpoint(tmp_path, precision):
    """Two ranks in one process, which both are filled."""
    form, scale = {
        "bf16": (QWEN3, None),
        "fp8_block": (V3, "weight_scale_inv"),
        "fp8_mxfp4": (V4, "scale"),
    }[precision]
    given, arguments = layers.weights(precision), layers.inputs()
    checkpoint = Checkpoint(write(tmp_path, split(form, given, scale), shards=2))
    moe = layers.make(precision=precision)
    checkpoint.load(moe, LAYER)
    layers.check(moe(*arguments), *arguments, precision, given=given)


def test_a_layer_equals_the_experts_of_transformers(tmp_path):
    """Qwen3's in float32, from the same tensors under the names that its files have."""
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = modeling.Qwen3MoeConfig(
        hidden_size=layers.H,
        moe_intermediate_size=layers.I,
        num_experts=layers.E,
        num_experts_per_tok=layers.K,
    )
    config._experts_implementation = "eager"
    given = layers.weights()
    values = config.to_dict() | {"hidden_size": layers.H}
    path = write(tmp_path, split(QWEN3, given), values)
    checkpoint = Checkpoint(path)
    assert checkpoint.moe_arguments() == {
        "num_experts": layers.E,
        "top_k": layers.K,
        "hidden_size": layers.H,
        "intermediate_size": layers.I,
        "precision": "bf16",
        "activation_clamp": None,
    }
    module = modeling.Qwen3MoeExperts(config)
    module.load_state_dict({"gate_up_proj": given.w13.float(), "down_proj": given.w2.float()})
    moe = MegaMoE(**checkpoint.moe_arguments(), max_tokens_per_rank=layers.T, world=layers.W,
                  device="cpu")  # fmt: skip
    checkpoint.load(moe, LAYER)
    xs, ids, router = layers.inputs()
    ids = [idx.clamp_min(0) for idx in ids]
    router = [weight.nan_to_num() for weight in router]
    for y, x, idx, weight in zip(moe(xs, ids, router), xs, ids, router, strict=True):
        with torch.no_grad():
            wanted = module(x.float(), idx.long(), weight)
        assert relative_error(y, wanted) <= max_relative_error("bf16")
