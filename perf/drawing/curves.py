"""What a report shows: result rows and peers' figures as curves over tokens, group by group.

A group is one layer on one set of GPUs under one routing. Its curves are implementations (with
their precision and mode), its bounds are rooflines per precision. Where a point was measured
several times the row of the latest date counts. Nothing here draws; `plots` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perf.recording.columns import KEY
from perf.running.timing import GRAPH, is_cold
from perf.workload.cases import MODELS, Model
from perf.workload.parts import MEGAMOE, PART_NAMES

GROUP = tuple(name for name in KEY if name not in ("tokens", "precision", "mode", "impl"))


def shape_of(model: Model) -> str:
    """H/I/E/K of the layer, with +S behind it if it has S shared experts."""
    shared = f"+{model.num_shared_experts}" if model.num_shared_experts else ""
    return f"{model.hidden}/{model.intermediate}/{model.num_experts}/{model.top_k}{shared}"


def is_known(model: Model) -> bool:
    """Whether the name says the shape, but for the numbers of experts."""
    known = MODELS.get(model.name)
    if known is None:
        return False
    shared = model.num_shared_experts
    return replace(known, num_experts=model.num_experts, num_shared_experts=shared) == model


def name_of(model: Model) -> str:
    """The name of the layer in slugs: no other layer has it."""
    sizes = "" if is_known(model) else f"-h{model.hidden}-i{model.intermediate}-k{model.top_k}"
    shared = f"-s{model.num_shared_experts}" if model.num_shared_experts else ""
    return f"{model.name}-e{model.num_experts}{sizes}{shared}"


@dataclass(frozen=True)
class Curve:
    """One implementation over tokens per rank: {tokens: microseconds}, {tokens: TFLOP/s per GPU}
    (useful; empty where nothing ran on a GPU). One of several modes is drawn, all are in tables.
    cold: measured with a cold L2. part: of the layer's work only, in tables only.
    """

    name: str
    precision: str
    us: dict[int, float]
    tflops: dict[int, float]
    ours: bool = False
    peer: bool = False
    drawn: bool = True
    cold: bool = False
    part: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.precision}"

    @property
    def series(self) -> tuple[str, str]:
        """What has one colour throughout a report: implementation and precision in any mode."""
        name = self.name if self.peer else self.name.partition(" (")[0]
        return name, self.precision

    def faces(self, other: Curve) -> bool:
        """Whether this is ours and `other` another's, so alike that their times compare."""
        alike = self.precision == other.precision and self.cold == other.cold
        return alike and self.ours and not (other.ours or other.part)


@dataclass(frozen=True)
class Group:
    """Curves that belong in one picture; `bounds` holds a roofline per precision."""

    gpu: str
    num_ranks: int
    ranks_per_gpu: int
    model: Model
    routing: str
    curves: tuple[Curve, ...]
    bounds: tuple[Curve, ...]

    @property
    def title(self) -> str:
        where = f"EP{self.num_ranks} on {self.num_ranks // self.ranks_per_gpu} x {self.gpu}"
        return f"{self.model.name} {shape_of(self.model)}, {where}, {self.routing} routing"

    @property
    def slug(self) -> str:
        """A file name and anchor: letters, digits and dashes."""
        gpus = self.num_ranks // self.ranks_per_gpu
        text = f"{self.gpu}-{name_of(self.model)}-ep{self.num_ranks}-{gpus}gpu-{self.routing}"
        return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())

    @property
    def tokens(self) -> list[int]:
        """Every token count of a measured row (peers may have others)."""
        return sorted({t for curve in self.curves if not curve.peer for t in curve.us})

    @property
    def drawn(self) -> list[Curve]:
        return [curve for curve in self.curves if curve.drawn]

    def speedups(self) -> list[tuple[Curve, dict[int, float]]]:
        """(another, {tokens: its time / time of ours}) of every drawn curve that ours faces and
        shares a token count with.
        """
        return [
            (other, {t: us / mine.us[t] for t, us in other.us.items() if t in mine.us})
            for mine in self.drawn
            for other in self.drawn
            if mine.faces(other) and set(mine.us) & set(other.us)
        ]


def groups_of(frame, peers=None) -> list[Group]:
    """The groups of result rows (`files.load`), in the order of first appearance."""
    latest = frame.sort_values("date", kind="stable").drop_duplicates(list(KEY), keep="last")
    return [
        _group(dict(zip(GROUP, key, strict=True)), rows, peers)
        for key, rows in latest.sort_index().groupby(list(GROUP), sort=False)
    ]


def _group(key: dict, rows, peers) -> Group:
    sizes = ("model", "hidden", "intermediate", "num_experts", "top_k", "num_shared_experts")
    model = Model(*(key[name] for name in sizes))
    curves = _curves(rows)
    if peers is not None and key["routing"] == "balanced" and key["ranks_per_gpu"] == 1:
        curves += _peer_curves(peers, key["gpu"], key["num_ranks"], model)
    return Group(
        key["gpu"],
        key["num_ranks"],
        key["ranks_per_gpu"],
        model,
        key["routing"],
        tuple(sorted(curves, key=lambda curve: (not curve.ours, curve.peer))),
        tuple(_bounds(rows)),
    )


def _column(rows, name: str) -> dict[int, float]:
    known = rows[rows[name].notna()].sort_values("tokens")
    return dict(zip(known.tokens.tolist(), map(float, known[name]), strict=True))


def _curves(rows) -> list[Curve]:
    """Every implementation in every mode; drawn is the mode with the most points, of those with a
    warm L2 if there are any.
    """
    curves = []
    for (impl, precision), same in rows.groupby(["impl", "precision"], sort=False):
        for place, mode in enumerate(sorted(same["mode"].value_counts().index, key=is_cold)):
            part = same[same["mode"] == mode]
            us, tflops = _column(part, "us_median"), _column(part, "tflops")
            name = f"{impl} ({mode})" if mode != GRAPH else impl
            alone = impl in PART_NAMES
            facts = {"ours": impl == MEGAMOE, "drawn": place == 0 and not alone, "part": alone}
            curves.append(Curve(name, precision, us, tflops, cold=is_cold(mode), **facts))
    return curves


def _bounds(rows) -> list[Curve]:
    """A roofline per precision, from any implementation's rows: they share the work."""
    known = rows[rows.roofline_us.notna() & rows.tflops.notna()]
    bounds = []
    for precision, same in known.groupby("precision", sort=False):
        once = same.drop_duplicates("tokens", keep="last")
        us = _column(once, "roofline_us")
        ceiling = once.assign(tflops=once.tflops * once.us_median / once.roofline_us)
        bounds.append(Curve("roofline", precision, us, _column(ceiling, "tflops")))
    return bounds


def _peer_curves(peers, gpu: str, num_ranks: int, model: Model) -> list[Curve]:
    """Peers that ran this very layer on as many of these GPUs."""
    if MODELS.get(model.name) != model:
        return []
    same = peers[(peers.gpu == gpu) & (peers.num_ranks == num_ranks) & (peers.model == model.name)]
    curves = []
    for (source, precision), rows in same.groupby(["source", "precision"], sort=False):
        us = _column(rows, "us")
        flops = 6 * model.top_k * model.hidden * model.intermediate  # of a token, all its slots
        tflops = {tokens: flops * tokens / time / 1e6 for tokens, time in us.items()}
        curves.append(Curve(source, precision, us, tflops, peer=True))
    return curves


def memory_of(model: Model, num_ranks: int, precision: str, tokens: int) -> dict[str, int]:
    """{region: bytes} of one rank's workspace with room for `tokens`, by this source's region
    table, the largest first; ValueError if the layer does not support the configuration.
    """
    from megamoe.config import supports
    from megamoe.regions import layout_of
    from perf.workload.cases import Case

    config = Case(model, num_ranks, tokens, precision=precision).config(tokens)
    supports(config)
    regions: Sequence = list(layout_of(config).regions.values())
    return {r.name: r.num_bytes for r in sorted(regions, key=lambda r: -r.num_bytes)}
