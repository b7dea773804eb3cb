"""The command `engine`: forwards of a small model of transformers, its experts run by each of
several implementations: eager loops, `grouped_mm`, and the layer.

Everything around the experts is the same, so a difference between two rows is theirs. Weights are
random. A batch of prompts is a prefill, a batch of single tokens costs what a step of decoding does
without the reading of a cache. Logits are compared with those of the eager loop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamoe.config import MoEConfig, supports
from megamoe.precision import PRECISIONS
from perf.arguments import (
    check_no_results,
    check_writable,
    integer,
    names,
    one_of,
    option,
    path_name,
    switches,
    token_counts,
)
from perf.recording.columns import FILLED, IDENTIFIES, POSITIVE, Environment, column
from perf.recording.environment import environment
from perf.recording.files import ResultsFile
from perf.running.options import csv_option, list_configs_option
from perf.running.timing import EAGER, GRAPH, Times, measure

SUMMARY = "time a model of transformers with its experts run by the layer, and by its own"
EPILOG = (
    "Needs transformers; both modes are timed unless one is named. On a GPU without the DSL the "
    "kernels are built ahead of time: --list-configs FILE, python -m megamoe.compile --list FILE "
    "--out DIR, then --kernel-dir DIR. Exit status: 0, or 1 if logits of the layer in bf16 are not "
    "those of the eager loop."
)

LOOP, GROUPED, OURS = "eager", "grouped_mm", "megamoe"
IMPLEMENTATIONS = (LOOP, GROUPED, OURS)
#: The loop asks the GPU which experts have tokens, which a graph cannot hold.
MODES = {LOOP: (EAGER,), GROUPED: (EAGER, GRAPH), OURS: (EAGER, GRAPH)}
#: Of logits in bf16 from those of the eager loop, as `EngineRow.differs` has it.
MAX_DIFFERENCE = 0.2


@dataclass(frozen=True)
class Sizes:
    """A Qwen3-MoE, and what is asked of it."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    batch: int
    lengths: tuple[int, ...]
    reps: int


SIZES = {
    "cpu": Sizes("emulated", 256, 128, 8, 2, 2, 2, 64, 2, batch=2, lengths=(6, 1), reps=1),
    "cuda": Sizes(
        "qwen3-30b-a3b", 2048, 768, 128, 8, 32, 4, 32000, 4, batch=4, lengths=(1024, 1), reps=30
    ),
}


@dataclass(frozen=True, kw_only=True)
class EngineRow(Environment):
    """A forward of a model. layers: of the model, whose other sizes are those of its name. length:
    tokens of each sequence of the batch. differs: relative L2 distance of a token's logits from
    those of the eager loop, the median over tokens, as a rounding gives some tokens to another
    expert. The last three: as in `Row`.
    """

    engine: str = column(IDENTIFIES)
    model: str = column(IDENTIFIES)
    layers: int = column(IDENTIFIES)
    batch: int = column(IDENTIFIES)
    length: int = column(IDENTIFIES)
    precision: str = column(IDENTIFIES)
    impl: str = column(IDENTIFIES)
    mode: str = column(IDENTIFIES)
    us_min: float = column(POSITIVE)
    us_median: float = column(POSITIVE)
    us_p95: float = column(POSITIVE)
    differs: float | None = None
    config: str = column(FILLED, default="-")
    sm_mhz: float | None = None
    power_w: float | None = None
    energy_mj: float | None = None


def _follows(name: str) -> str:
    return ", ".join(f"{getattr(sizes, name)} on {device}" for device, sizes in SIZES.items())


@dataclass(frozen=True)
class Options:
    device: str = option(", ".join(SIZES), default="cpu", type=one_of(SIZES), metavar="NAME")
    layers: int | None = option(_follows("layers"), type=integer(1, 1000), metavar="N")
    batch: int | None = option(f"sequences: {_follows('batch')}", type=integer(1), metavar="N")
    lengths: Sequence[int] | None = option(
        f"tokens of a sequence: {_follows('lengths')}", type=token_counts, metavar="LIST"
    )
    max_tokens: int | None = option(
        "tokens of a launch, else those of the largest batch", type=integer(1), metavar="T"
    )
    impl: tuple[str, ...] = option(
        f"one or several of {', '.join(IMPLEMENTATIONS)}",
        default=IMPLEMENTATIONS,
        type=names(IMPLEMENTATIONS),
        metavar="LIST",
    )
    precision: tuple[str, ...] = option(
        f"of the layer, one or several of {', '.join(PRECISIONS)}; the others run in bf16",
        default=("bf16",),
        type=names(PRECISIONS),
        metavar="LIST",
    )
    mode: str | None = switches(
        {GRAPH: "only replays of CUDA graphs, of what can be captured", EAGER: "only calls"}
    )
    kernel_dir: str | None = option("kernels compiled ahead of time", type=path_name, metavar="DIR")
    reps: int | None = option(
        f"timed calls: {_follows('reps')}", type=integer(1, 10_000), metavar="N"
    )
    csv: str | None = csv_option("append a row per line that is printed")
    list_configs: Path | None = list_configs_option()

    @property
    def sizes(self) -> Sizes:
        given = {name: getattr(self, name) for name in ("layers", "batch", "lengths", "reps")}
        changes = {name: value for name, value in given.items() if value}
        return dataclasses.replace(SIZES[self.device], **changes)

    @property
    def capacity(self) -> int:
        return self.max_tokens or self.sizes.batch * max(self.sizes.lengths)

    def config(self, precision: str) -> MoEConfig:
        """Of the layer. ValueError if it is not supported."""
        sizes = self.sizes
        config = MoEConfig(
            sizes.num_experts, sizes.top_k, sizes.hidden, sizes.intermediate, self.capacity, 1,
            precision,
        )  # fmt: skip
        supports(config)
        return config


def model_of(sizes: Sizes, device: torch.device) -> Any:
    """With random weights, in bf16."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.intermediate,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=128,
        vocab_size=sizes.vocabulary,
        initializer_range=sizes.hidden**-0.5,  # experts are most of what a layer adds
        norm_topk_prob=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def contenders_of(options: Options) -> list[tuple[str, str, str]]:
    """(name for transformers, implementation, precision) of everything that is timed; the eager
    loop first, as others are compared with it.
    """
    found = [(name, name, "bf16") for name in (LOOP, GROUPED) if name in options.impl]
    if OURS in options.impl:
        found += [(f"{OURS}_{recipe}", OURS, recipe) for recipe in options.precision]
    return found


def register(options: Options) -> Callable[[Any], object]:
    """Register the layer under a name per recipe; what gives a model's layers back. ValueError
    without transformers.
    """
    try:
        from megamoe.integrations import transformers as integration
    except ImportError as error:
        raise ValueError(str(error)) from None
    for name, implementation, precision in contenders_of(options):
        if implementation == OURS:
            integration.configure(
                name,
                precision=precision,
                max_tokens=options.capacity,
                kernel_dir=options.kernel_dir,
            )
    return integration.release


def write_configs(options: Options) -> int:
    assert options.list_configs is not None, "nobody asked for it"
    check_no_results("--list-configs", options.list_configs)
    check_writable("--list-configs", options.list_configs)
    entries = [dataclasses.asdict(options.config(precision)) for precision in options.precision]
    options.list_configs.write_text(json.dumps(entries))
    return 0


def line(row: EngineRow) -> str:
    differs = "-" if row.differs is None else f"{row.differs:.2e}"
    return (
        f"{row.batch:>3} x {row.length:<5} {row.impl:>10} {row.precision:>15} {row.mode:>6} "
        f"{row.us_min / 1e3:>10.3f} {row.us_median / 1e3:>10.3f} {row.us_p95 / 1e3:>10.3f} "
        f"{differs:>9}"
    )


HEADING = (
    f"{'batch':>11} {'experts':>10} {'precision':>15} {'mode':>6} {'ms min':>10} {'median':>10} "
    f"{'p95':>10} {'differs':>9}"
)


def measured(options: Options, keep: Callable[[EngineRow], object]) -> bool:
    """Time everything; False if logits of the layer in bf16 are others."""
    release, sizes, device = register(options), options.sizes, torch.device(options.device)
    import transformers

    model, where, right = model_of(sizes, device), environment(device), True
    ids = torch.randint(sizes.vocabulary, (sizes.batch, max(sizes.lengths)), device=device)
    expected: dict[int, torch.Tensor] = {}
    for name, implementation, precision in contenders_of(options):
        model.set_experts_implementation(name)
        for length in sizes.lengths:
            given = ids[:, :length].contiguous()
            for mode in MODES[implementation]:
                if options.mode not in (None, mode) or (mode == GRAPH and device.type == "cpu"):
                    continue
                times, logits = timed(model, given, device, mode, sizes.reps)
                differs = None
                if implementation == LOOP:
                    expected[length] = logits
                elif length in expected:
                    differs = difference(logits, expected[length])
                    right &= precision != "bf16" or differs <= MAX_DIFFERENCE
                keep(
                    EngineRow(
                        **where,
                        engine=f"transformers {transformers.__version__}",
                        model=sizes.name,
                        layers=sizes.layers,
                        batch=sizes.batch,
                        length=length,
                        precision=precision,
                        impl=implementation,
                        mode=mode,
                        differs=differs,
                        config=f"max_tokens={options.capacity}" if implementation == OURS else "-",
                        **times.columns,
                    )
                )
        release(model)
    return right


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """`EngineRow.differs`."""
    rows, own = logits.flatten(0, -2), expected.flatten(0, -2)
    return ((rows - own).norm(dim=1) / own.norm(dim=1)).nan_to_num(torch.inf).median().item()


@torch.no_grad()
def timed(
    model: Any, ids: torch.Tensor, device: torch.device, mode: str, reps: int
) -> tuple[Times, torch.Tensor]:
    """Times of a forward, and its logits in float32."""
    warmup = 1 if device.type == "cpu" else 3
    times, logits = measure(
        lambda: model(ids, use_cache=False).logits, device, mode, repetitions=reps, warmup=warmup
    )
    assert isinstance(logits, torch.Tensor)
    return times, logits.float()


def run(options: Options) -> int:
    """Time, print and keep; 1 if logits of the layer in bf16 are not those of the eager loop."""
    for precision in options.precision:
        options.config(precision)
    if options.list_configs:
        return write_configs(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; use --device cpu")
    file = ResultsFile(options.csv, EngineRow) if options.csv else None
    sizes = options.sizes
    print(
        f"{sizes.name} (H={sizes.hidden} I={sizes.intermediate} E={sizes.num_experts} "
        f"K={sizes.top_k}), {sizes.layers} layers, {sizes.reps} timed call(s)"
    )
    if options.device == "cpu":
        print("CPU emulation of the layer: its times are those of a CPU, not GPU figures.")
    print(HEADING)

    def keep(row: EngineRow) -> None:
        if file:
            file.append(row)
        print(line(row), flush=True)

    return 0 if measured(options, keep) else 1
