"""The frozen plans that options become, one per precision.

A plan has every default filled in and is legal: `plans_of` looks at every configuration before any
of them runs. Neighbours: `checks` says whether it can run here, `runner` runs it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megamoe import budget
from megamoe.config import select
from megamoe.module import MegaMoE
from perf.against import deepep
from perf.against.ceilings import ceilings_of
from perf.against.roofline import CEILINGS, Ceilings, Roofline, Work, roofline_of
from perf.arguments import check_no_results, check_writable
from perf.running.jobs import Place
from perf.running.options import DEFAULTS, Options
from perf.running.timing import COLD, GRAPH, WARM, mode_label
from perf.workload.cases import MODELS, Case, Model
from perf.workload.shared import halves_of

#: Name of a model whose sizes were given.
CUSTOM = "custom"
#: Options that replace a size of the model, by field of `Model`.
SIZES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "num_experts": "num_experts",
    "top_k": "top_k",
    "num_shared_experts": "shared_experts",
}
#: Those that say nothing of a model's own shape.
NUMBERS = ("num_experts", "num_shared_experts")


@dataclass(frozen=True)
class Plan:
    """A sweep with every default filled in; `case` is its point of the first token count.
    `kernel_options`: fields of `KernelConfig` that differ from the choice for the configuration.
    """

    case: Case
    device: torch.device
    tokens: tuple[int, ...]
    max_tokens: int
    mode: str
    reps: int
    warmup: int
    num_sms: int | None
    kernel_dir: str | None
    baselines: tuple[str, ...]
    verify: bool
    workspace_bytes: int  # of one rank
    ceilings: Ceilings | None  # None: nobody knows those of this device
    kernel_options: dict[str, object] = field(default_factory=dict)
    l2: str = WARM  # before every timed call
    staging: bool = False  # is measured too, where there is any
    two_streams: bool = False  # are measured too
    shared_sms: int | None = None  # of the shared experts there, if somebody said so

    def label(self, mode: str) -> str:
        """What stands in `mode` of the rows that this plan measures in a mode of `timing`."""
        return mode_label(mode, self.l2)

    @property
    def emulated(self) -> bool:
        return self.device.type == "cpu"

    @property
    def stages(self) -> bool:
        """Whether a forward copies its tokens before the launch: one that quantises them writes
        them to where peers read them itself, and a single rank has no peers.
        """
        return self.case.num_ranks > 1 and not self.case.recipe.tokens.has_scales

    def roofline_of(self, work: Work) -> Roofline | None:
        """The bound of `work`; None where ceilings are not known."""
        dtype = self.case.recipe.tokens.mma
        return roofline_of(work, self.ceilings, dtype) if self.ceilings else None

    @property
    def weight_bytes(self) -> int:
        """Of one rank, kept once: scale factors and copies come on top."""
        config = self.case.config(self.max_tokens)
        values = 3 * config.hidden_size * config.intermediate_size * config.local_experts
        return self.case.recipe.weights.num_bytes(values)


def _model_of(options: Options) -> Model:
    """The model with the sizes asked for; "custom" once more than its numbers of experts differ."""
    model = MODELS[options.model or DEFAULTS[options.device].model]
    asked = {name: getattr(options, option) for name, option in SIZES.items()}
    sizes = {name: size for name, size in asked.items() if size}
    if any(size != getattr(model, name) for name, size in sizes.items() if name not in NUMBERS):
        sizes["name"] = CUSTOM
    return dataclasses.replace(model, **sizes)


def case_of(
    options: Options, gpus: int = 1, precision: str | None = None
) -> tuple[Case, tuple[int, ...], int]:
    """(case of the first token count, token counts, capacity per rank), wherever it will run: all
    ranks on one GPU, or a process and a rank on each of several. Of the first precision unless told
    otherwise.
    """
    model, tokens = _model_of(options), options.counts
    max_tokens = options.max_tokens or max(tokens)
    if max(tokens) > max_tokens:
        raise ValueError(f"--tokens {max(tokens)} is more than --max-tokens {max_tokens}")
    if gpus > 1 and options.ranks not in (None, gpus):
        raise ValueError(f"--ranks {options.ranks}, but torchrun started {gpus} processes")
    ranks = gpus if gpus > 1 else options.ranks or DEFAULTS[options.device].ranks
    case = Case(
        model=model,
        num_ranks=ranks,
        tokens=tokens[0],
        ranks_per_gpu=ranks // gpus,
        routing=options.routing,
        precision=precision or options.precision[0],
        seed=options.seed,
        spread=options.spread,
    )
    for one in (case, *stream_cases(options, case)):
        config = one.config(max_tokens)
        budget.check(config, select(config))
    case.check_routing(max(tokens))
    return case, tokens, max_tokens


def stream_cases(options: Options, case: Case) -> tuple[Case, ...]:
    """The layers that two streams need beside that of the case; ValueError if they cannot be."""
    if not options.two_streams:
        if options.shared_sms is not None:
            raise ValueError(f"--shared-sms {options.shared_sms} needs --two-streams")
        return ()
    if not case.model.num_shared_experts:
        raise ValueError("--two-streams needs --shared-experts 1 or more: they get one of the two")
    return halves_of(case)


def kernels_of(
    options: Options, gpus: int = 1, kernels: Sequence[dict[str, object]] = ({},)
) -> list[dict]:
    """Entries for `python -m megamoe.compile --list`: a kernel per precision and options."""
    entries = []
    for precision in options.precision:
        case, _, max_tokens = case_of(options, gpus, precision)
        for one in (case, *stream_cases(options, case)):
            fields = dataclasses.asdict(one.config(max_tokens))
            entries += [fields | ({"kernel": kernel} if kernel else {}) for kernel in kernels]
    return entries


def write_configs(options: Options, kernels: Sequence[dict[str, object]]) -> int:
    """Write these entries to the file that was asked for; 0."""
    path = options.list_configs
    assert path is not None, "nobody asked for it"
    check_no_results("--list-configs", path)
    check_writable("--list-configs", path)
    path.write_text(json.dumps(kernels_of(options, kernels=kernels)))
    return 0


def plan_of(
    options: Options,
    place: Place | None = None,
    precision: str | None = None,
    kernel_options: dict[str, object] | None = None,
) -> Plan:
    """The plan that the options ask for, in the job of `place` if there is one; ValueError if it
    cannot run here. Of the first precision unless told otherwise.
    """
    default, device = DEFAULTS[options.device], torch.device(options.device)
    if place and options.device == "cpu":
        raise ValueError("torchrun needs --device cuda; on a CPU one process holds all ranks")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; use --device cpu")
    mode = options.mode or default.mode
    if options.device == "cpu" and mode == GRAPH:
        raise ValueError("--graph needs --device cuda; use --eager")
    if options.device == "cpu" and options.l2 == COLD:
        raise ValueError("--l2 cold needs --device cuda: a CPU's L2 is another")
    if place:
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {place.local_rank} of this machine has no GPU of its own: "
                f"torch sees {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", place.local_rank)
    case, tokens, max_tokens = case_of(options, place.size if place else 1, precision)
    kernel_options = kernel_options or {}
    if deepep.NAME in options.baseline:
        if case.model.num_shared_experts:
            raise ValueError(
                f"--baseline {deepep.NAME} has no shared experts: leave out "
                f"--shared-experts {case.model.num_shared_experts}"
            )
        deepep.check_available(case.precision, place is not None, options.verify)
    return Plan(
        case=case,
        device=device,
        tokens=tokens,
        max_tokens=max_tokens,
        mode=mode,
        reps=options.reps or default.reps,
        warmup=default.warmup,
        num_sms=options.num_sms,
        kernel_dir=options.kernel_dir,
        baselines=options.baseline,
        verify=options.verify,
        workspace_bytes=_workspace_bytes(case, max_tokens, kernel_options),
        ceilings=_ceilings(options, device, case),
        kernel_options=kernel_options,
        l2=options.l2,
        staging=options.staging,
        two_streams=options.two_streams,
        shared_sms=options.shared_sms,
    )


def _ceilings(options: Options, device: torch.device, case: Case) -> Ceilings | None:
    """Of the file asked for, else those that are known of this GPU; ValueError if they do not cover
    the precision.
    """
    if device.type == "cpu":
        if options.ceilings:
            raise ValueError("--ceilings needs --device cuda: a CPU has no roofline")
        return None
    gpu = torch.cuda.get_device_name(device)
    found = (
        ceilings_of(options.ceilings, gpu, case.num_gpus) if options.ceilings else CEILINGS.get(gpu)
    )
    if found:
        found.gemm(case.recipe.tokens.mma)
    return found


def _workspace_bytes(case: Case, max_tokens: int, kernel_options: dict[str, object]) -> int:
    """Of one rank; ValueError if the layer cannot run this shape."""
    config = case.config(max_tokens)
    sizes = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    sizes |= {"world": sizes.pop("num_ranks"), "kernel_options": kernel_options}
    return MegaMoE.workspace_bytes(**sizes)["total"]


def plans_of(options: Options, place: Place | None = None) -> list[Plan]:
    """A plan for every precision; ValueError if any of them cannot run here."""
    return [plan_of(options, place, precision) for precision in options.precision]
