"""What is legal, and that a refusal names the field and the value."""

from __future__ import annotations

import dataclasses
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe import budget
from megamoe.architecture import ARCHITECTURES, with_kernels
from megamoe.config import (
    DEFAULT_POOL_BLOCK_BYTES,
    MAX_RANKS,
    MAX_ROUTED_SLOTS,
    MAX_TOP_K,
    PARTS,
    KernelConfig,
    MoEConfig,
    max_pool_blocks,
    pool_blocks,
    select,
    supports,
)
from megamoe.precision import (
    BF16,
    INT4,
    ITEM_BYTES,
    MXFP4,
    PACKED,
    PRECISIONS,
    WHOLE_ROW,
    Operand,
    e4m3,
    num_scales,
    precision_of,
)

ROOT = Path(__file__).resolve().parents[2]
GOOD = MoEConfig(32, 4, 256, 256, 64, num_ranks=8)

MODELS = {
    "v3": (256, 8, 7168, 2048),
    "pro": (384, 6, 7168, 3072),
    "flash": (256, 6, 4096, 2048),
    "mimo": (384, 8, 6144, 2048),
    "mixtral": (8, 2, 4096, 14336),
}


def with_(**fields):
    return dataclasses.replace(GOOD, **fields)


@pytest.mark.parametrize("tokens", [1, 7, 128, 8192, 32768])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_are_supported(precision, model, world, tokens):
    config = MoEConfig(*MODELS[model], tokens, num_ranks=world, precision=precision)
    supports(config)
    supports(config, select(config))
    budget.check(config, select(config))


def bad_values(values: dict[str, tuple]) -> list[tuple]:
    """(field, value) of every one."""
    return [(field, value) for field, bad in values.items() for value in bad]


BAD_FIELDS = bad_values({
    "precision": ("fp4", "BF16", "", [], None),
    "num_ranks": (0, -1, MAX_RANKS + 1, 2.0, True),
    "num_experts": (0, -8, "32", 33, 4),
    "top_k": (0, -1, MAX_TOP_K + 1, None),
    "hidden_size": (0, -128, 64, 129, 7168.0),
    "intermediate_size": (0, 200, -256, False),
    "max_tokens_per_rank": (0, -3, 1.5, MAX_ROUTED_SLOTS),
})  # fmt: skip


@pytest.mark.parametrize("check", [supports, select])
@pytest.mark.parametrize("field,value", BAD_FIELDS)
def test_bad_field_is_named_with_its_value(field, value, check):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        check(with_(**{field: value}))


#: Values that nothing makes fit.
BAD_OVERRIDES = bad_values({
    "block_m": (0, "a", 128.0),
    "block_n": (None,),
    "block_k": (-64,),
    "num_stages": ("4", 1),
    "weight_run": ("a", 0),
    "group_blocks": ("a", 0, -1),
    "lag_waves": (-1, 1.5),
    "pool_blocks": ("8", False, 0, -4),
    "pull_piece_bytes": (15,),
    "frontend_registers": (16, 84),
    "math_registers": (201, 264, "208"),
    "only": ("GEMMs", "reduce", None),
    "trace": (1, None),
    "arch": ("sm_70", None, []),
})  # fmt: skip
#: Those that only fit or do not fit the problem or each other: `select` makes some of them fit.
RELATIVE = bad_values({
    "block_m": (64, 256), "block_n": (128,), "block_k": (128, 32), "weight_run": (4,),
    "group_blocks": (100,),
})  # fmt: skip


@pytest.mark.parametrize("check", [supports, budget.check])
@pytest.mark.parametrize("field,value", BAD_OVERRIDES + RELATIVE)
def test_bad_kernel_field_is_named_with_its_value(field, value, check):
    with pytest.raises(ValueError) as error:
        check(GOOD, dataclasses.replace(select(GOOD), **{field: value}))
    shown = value if isinstance(value, int) else repr(value)
    assert f"{field}={shown}" in str(error.value)


@pytest.mark.parametrize("field,value", BAD_OVERRIDES)
def test_bad_override_is_named_before_anything_is_computed(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}={re.escape(repr(value))} "):
        select(GOOD, **{field: value})


@pytest.mark.parametrize("value", range(24, 209, 8))
def test_multiples_of_eight_registers_are_supported(value):
    supports(GOOD, select(GOOD, frontend_registers=value, math_registers=value))


def test_an_unknown_override_names_the_nearest_field():
    with pytest.raises(ValueError, match="no field 'math_register', did you mean 'math_registers'"):
        select(GOOD, math_register=208)
    with pytest.raises(ValueError, match="no field 'colour'; fields: arch, block_m, "):
        select(GOOD, colour=1)


def test_only_architectures_with_a_kernel_are_offered(monkeypatch):
    """A row of numbers is not enough; what the kernel needs follows from the row that is named."""
    other = replace(ARCHITECTURES["sm_90a"], name="sm_99a", folder="sm99", shared_bytes=1)
    monkeypatch.setitem(ARCHITECTURES, other.name, other)
    with pytest.raises(ValueError, match=r"arch='sm_99a' is not .*; choose one of \['sm_90a'\]"):
        select(GOOD, arch="sm_99a")
    kernels = ROOT / "megamoe" / "kernels"
    folders = {path.parent.name for path in kernels.glob("*/kernel.py")}
    assert folders == {row.folder for row in with_kernels()}

    monkeypatch.setitem(ARCHITECTURES, other.name, replace(other, folder="sm90"))
    kernel = select(GOOD, arch="sm_99a")
    supports(GOOD, kernel)
    with pytest.raises(ValueError, match="shared memory; a CTA has 1$"):
        budget.check(GOOD, kernel)


def test_a_part_of_a_launch_may_run_alone():
    for part in PARTS:
        kernel = select(GOOD, only=part)
        supports(GOOD, kernel)
        assert [name for name in PARTS if kernel.runs(name)] == [part]
    assert all(select(GOOD).runs(name) for name in PARTS)


def test_precision_message_lists_the_choices():
    with pytest.raises(ValueError, match="bf16"):
        precision_of("int3")


def test_indivisible_experts_name_both_fields():
    with pytest.raises(ValueError, match="num_experts=33.*num_ranks=8"):
        supports(with_(num_experts=33))


@pytest.mark.parametrize("world", [1, 8, 72])
def test_slot_limit_is_exact(world):
    """The largest T passes, and one more is refused: signed 32-bit codes hold W * T * K slots."""
    most = MAX_ROUTED_SLOTS // (world * 4)
    config = MoEConfig(72, 4, 128, 128, most, num_ranks=world)
    supports(config)
    assert world * most * 4 <= 2**31 - 2
    with pytest.raises(ValueError, match=f"max_tokens_per_rank={most + 1}"):
        supports(dataclasses.replace(config, max_tokens_per_rank=most + 1))


def test_group_must_fit_the_ring():
    """A unit larger than the ring could never start: the stream would run FC2 before FC1."""
    kernel = select(GOOD, pool_blocks=4)
    assert kernel.group_blocks == 4
    supports(GOOD, kernel)
    with pytest.raises(ValueError, match="group_blocks=5"):
        supports(GOOD, dataclasses.replace(kernel, group_blocks=5))


def test_top_k_may_exceed_the_experts():
    """A token may name one expert in several slots."""
    supports(MoEConfig(1, 4, 128, 128, 8))


# --- derived numbers


@pytest.mark.parametrize("seed", range(40))
def test_max_pool_blocks_covers_every_routing(seed):
    """No split of all W * T * K slots over the local experts needs more pool blocks."""
    rng = random.Random(seed)
    world, top_k = rng.choice([1, 2, 8]), rng.randint(1, 8)
    local, tokens = rng.randint(1, 40), rng.randint(1, 400)
    config = MoEConfig(local * world, top_k, 128, 128, tokens, num_ranks=world)
    kernel = KernelConfig()
    rows = world * tokens * top_k
    for _ in range(20):
        cuts = sorted(rng.choices(range(rows + 1), k=local - 1))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
        blocks = sum(-(-count // kernel.block_m) for count in counts)
        assert blocks <= max_pool_blocks(config, kernel)
    assert max_pool_blocks(config, kernel) <= -(-rows // kernel.block_m) + local


@pytest.mark.parametrize(
    "tokens,asked,expected",
    [
        (64, None, 20),
        (64, 8, 8),
        (64, 1000, 20),
        (32768, None, DEFAULT_POOL_BLOCK_BYTES // 2),
        (32768, 500, 500),
    ],
)
def test_pool_ring(tokens, asked, expected):
    config = with_(max_tokens_per_rank=tokens)
    assert max_pool_blocks(config, KernelConfig()) == 8 * tokens * 4 // 128 + 4
    assert pool_blocks(config, KernelConfig(pool_blocks=asked)) == expected


def test_select_applies_overrides_and_fits_the_group():
    kernel = select(GOOD, num_stages=3, lag_waves=5, group_blocks=2)
    assert (kernel.num_stages, kernel.lag_waves, kernel.group_blocks) == (3, 5, 2)
    tiny = MoEConfig(1, 1, 128, 128, 1)
    assert select(tiny).group_blocks == pool_blocks(tiny, select(tiny)) == 1


def test_configurations_are_frozen_keys():
    assert with_() == GOOD and hash(GOOD) == hash(with_())
    assert hash(KernelConfig()) == hash(select(with_(max_tokens_per_rank=8192)))
    for config, field in ((GOOD, "top_k"), (KernelConfig(), "block_m")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, 1)


def test_default_kernel_is_consistent():
    kernel = KernelConfig()
    assert kernel.num_math_warpgroups * 64 == kernel.block_m
    assert kernel.num_math_warps == 8
    assert kernel.num_threads == 384
    # setmaxnreg: the register file of one CTA of 384 threads
    assert kernel.frontend_registers + 2 * kernel.math_registers <= 504
    assert kernel.frontend_registers % 8 == kernel.math_registers % 8 == 0


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_rows(name):
    torch = pytest.importorskip("torch")
    recipe = precision_of(name)
    assert recipe.name == name
    for operand in (recipe.tokens, recipe.weights, recipe.hidden):
        item_bits = 8 * getattr(torch, operand.storage).itemsize
        assert item_bits == (8 if operand.packed else operand.bits)
        assert operand.has_scales == (operand.bits <= 8)
        scale = torch.uint8 if operand.scales_values else torch.float32
        assert getattr(torch, operand.scale) is scale
        assert operand.packed == (operand in PACKED)
    assert not recipe.tokens.packed and not recipe.hidden.packed
    assert recipe.output_bytes == ITEM_BYTES[recipe.output]
    # FC1's epilogue holds half a tile of a row: as many columns as share a scale.
    assert recipe.hidden.scale_columns in (0, KernelConfig().block_n // 2)


def e5m2(operand: Operand) -> Operand:
    return replace(operand, storage="float8_e5m2", mma="float8_e5m2")


FLOAT16 = Operand("float16", 16, "float16")
#: Rows that the kernel cannot run: what differs from a recipe, and words of the message.
IMPOSSIBLE = {
    "hidden scales of half a tile": ("fp8_block", {"hidden": e4m3(1, 64)}, "hidden.*scale_block"),
    "one hidden scale": ("fp8_block", {"hidden": e4m3(1, WHOLE_ROW)}, "hidden.*scale_block"),
    "hidden scales of rows": ("fp8_block", {"hidden": e4m3(2, 128)}, "hidden.*scale_block"),
    "weights in groups": ("fp8_block", {"weights": e4m3(1, 32)}, "weights.*scale_block"),
    "weights by channel alone": (
        "fp8_block", {"weights": e4m3(1, WHOLE_ROW)}, "weights.*scale_block.*tokens"
    ),
    "tokens by row alone": (
        "fp8_block", {"tokens": e4m3(1, WHOLE_ROW)}, "weights.*scale_block.*tokens"
    ),
    "tokens by 64": ("fp8_block", {"tokens": e4m3(1, 64)}, "tokens.*scale_block"),
    "tokens of other bytes": ("fp8_block", {"tokens": BF16}, "weights.*float8_e4m3fn.*bfloat16"),
    "BF16 tokens": ("bf16", {"weights": e4m3(128, 128)}, "weights.*float8_e4m3fn.*bfloat16"),
    "BF16 hidden rows": ("fp8_block", {"hidden": BF16}, "hidden.*bfloat16.*float8_e4m3fn"),
    "e4m3 hidden rows": ("bf16", {"hidden": e4m3(1, 128)}, "hidden.*float8_e4m3fn.*bfloat16"),
    "BF16 with scales": (
        "bf16", {"tokens": replace(BF16, scale_block=(1, 64))}, "tokens.*scale_block"
    ),
    "weights without scales": (
        "fp8_block", {"weights": replace(e4m3(1, 1), scale_block=(0, 0))}, "weights.*scale_block"
    ),
    "float16": ("bf16", dict.fromkeys(("tokens", "weights", "hidden"), FLOAT16), "float16"),
    "e5m2": (
        "fp8_block", {name: e5m2(e4m3(*block)) for name, block in
                      (("tokens", (1, 128)), ("weights", (128, 128)), ("hidden", (1, 128)))},
        "float8_e5m2",
    ),
    "packed weights of bytes": (
        "fp8_mxfp4", {"weights": replace(MXFP4, storage="int8")}, "weights.storage='int8'.*'uint8'"
    ),
    "packed weights of 2 bits": (
        "fp8_mxfp4", {"weights": replace(MXFP4, bits=2)}, "weights.bits=2: .* 4"
    ),
    "packed groups of 64": (
        "fp8_mxfp4", {"weights": replace(MXFP4, scale_block=(1, 64))},
        r"weights.scale_block=\(1, 64\): .*\(1, 32\)"
    ),
    "packed groups of rows": (
        "fp8_mxfp4", {"weights": replace(MXFP4, scale_block=(32, 32))}, "weights.scale_block"
    ),
    "packed weights without scales": (
        "fp8_mxfp4", {"weights": replace(MXFP4, scale_block=(0, 0))}, "weights.scale_block"
    ),
    "packed weights with float32 scales": (
        "fp8_mxfp4", {"weights": replace(MXFP4, scale="float32")}, "weights.scale='float32'"
    ),
    "integers with exponents": (
        "fp8_int4", {"weights": replace(INT4, scale="uint8")}, "weights.scale='uint8'.*'float32'"
    ),
    "integers in groups of 64": (
        "fp8_int4", {"weights": replace(INT4, scale_block=(1, 64))},
        r"weights.scale_block=\(1, 64\): .*\(1, 128\) or \(1, 32\)"
    ),
    "packed weights that BF16 multiplies": (
        "fp8_mxfp4", {"weights": replace(MXFP4, mma="bfloat16")},
        "weights.mma='bfloat16'.*float8_e4m3fn"
    ),
    "packed weights and BF16 tokens": (
        "bf16", {"weights": MXFP4}, "weights.mma='float8_e4m3fn'.*bfloat16"
    ),
    "integers and tokens by row": ("fp8_channel", {"weights": INT4}, "tokens.scale_block.*128"),
    "packed weights and BF16 hidden rows": ("fp8_mxfp4", {"hidden": BF16}, "hidden.mma='bfloat16'"),
    "packed weights and one hidden scale": (
        "fp8_mxfp4", {"hidden": e4m3(1, WHOLE_ROW)}, "hidden.scale_block"
    ),
    "packed hidden rows": ("fp8_mxfp4", {"hidden": MXFP4}, "hidden.storage='uint8'"),
    "scales of 8 bits": (
        "fp8_block", {"weights": replace(e4m3(128, 128), scale="uint8")}, "weights.*scale=.*uint8"
    ),
    "two bytes of 8 bits": (
        "fp8_block", {"weights": replace(e4m3(128, 128), bits=16)}, "weights.*bits=16"
    ),
    "float32 output": ("bf16", {"output": "float32"}, "output.*float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_recipe_that_the_kernel_cannot_run_is_refused(monkeypatch, case):
    name, changes, words = IMPOSSIBLE[case]
    monkeypatch.setitem(PRECISIONS, name, replace(PRECISIONS[name], **changes))
    config = with_(precision=name)
    with pytest.raises(ValueError, match=words):
        budget.check(config, select(config))


@pytest.mark.parametrize(
    "columns,block,scales", [(384, 0, 0), (384, 128, 3), (400, 128, 4), (7168, WHOLE_ROW, 1)]
)
def test_scales_of_a_row(columns, block, scales):
    assert num_scales(columns, block) == scales


def test_a_k_block_is_128_bytes_in_every_recipe():
    for name, recipe in PRECISIONS.items():
        assert recipe.tokens.num_bytes(select(with_(precision=name)).block_k) == 128
    with pytest.raises(ValueError, match="block_k=64 must span 128 bytes of float8_e4m3fn"):
        supports(with_(precision="fp8_block"), select(with_(precision="fp8_block"), block_k=64))
