"""Curves as pictures, by matplotlib (the extra `report`), which is imported only when one is drawn.

A curve is told apart by colour, marker and line style at once; the colours are those of Okabe and
Ito, which remain distinct for colour-blind readers.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from perf.drawing.curves import Curve, Group

#: Blue, vermillion and wine are ours, black is a bound; the order of the rest keeps neighbours far
#: apart.
OUR_COLOURS: Sequence[str] = ("#0072B2", "#D55E00", "#882255")
COLOURS: Sequence[str] = (
    "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666", "#332288", "#999933",
)  # fmt: skip
OUR_MARKERS, MARKERS = "oD*", "s^vPX<>hd"
BOUND_STYLES = ("--", ":", "-.")
#: In the order of `phases.PHASES`: waits are grey.
PHASE_COLOURS = ("#F0E442", "#0072B2", "#56B4E9", "#009E73", "#CCCCCC", "#888888", "#D55E00")
#: Inches; a picture of the page is no wider than a phone, so that its text keeps its size.
PAGE_WIDTH = 3.6

#: {"svg": ..., "png": ...}
Picture = dict[str, bytes]
Styled = list[tuple[Curve, dict]]
#: By series.
Styles = dict[tuple[str, str], dict]

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.35,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "perf",  # the same picture, the same file
    "text.parse_math": False,
}
#: Regions with a bar of their own; the small rest is one bar.
REGION_BARS = 8


@contextmanager
def _subplots(*args, **kwargs):
    """A figure and its axes that take no display and are closed at the end."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError(f"plots need {error.name}: pip install -e '.[report]'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained", figsize=kwargs.pop("figsize"))
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(*args, **kwargs)


def _count(value: float, position: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _token_axis(axis, group: Group) -> None:
    """Powers of two at the token counts themselves, at most nine of them."""
    tokens = sorted({t for curve in group.drawn for t in curve.us})
    axis.set_xscale("log", base=2)
    step = -(-len(tokens) // 9)
    axis.set_xticks(
        tokens[::-1][::step], [f"{t:,}" for t in tokens[::-1][::step]],
        rotation=45, ha="right", rotation_mode="anchor",
    )  # fmt: skip
    axis.minorticks_off()
    axis.set_xlabel("tokens per rank")


def styles_of(groups: Iterable[Group]) -> Styles:
    """Colour, marker and line of every series of a report."""
    styles: Styles = {}
    mine, rest, lines = itertools.count(), itertools.count(), itertools.count()
    for group in groups:
        for curve in group.drawn:
            if curve.series in styles:
                continue
            n, colours, markers = next(rest), COLOURS, MARKERS
            if curve.ours:
                n, colours, markers = next(mine), OUR_COLOURS, OUR_MARKERS
            style = {"color": colours[n % len(colours)], "marker": markers[n % len(markers)]}
            if curve.peer:
                style |= {"linestyle": ":", "markerfacecolor": "white"}
            styles[curve.series] = style | {"linewidth": 2.2 if curve.ours else 1.3}
        for bound in group.bounds:
            if bound.series not in styles:
                line = BOUND_STYLES[next(lines) % len(BOUND_STYLES)]
                styles[bound.series] = {"color": "black", "linestyle": line}
    return styles


def _styled(group: Group, styles: Styles) -> Styled:
    """Every drawn curve and bound with its style and label."""
    curves = (*group.drawn, *group.bounds)
    return [
        (curve, {"markersize": 5, "label": curve.label} | styles[curve.series]) for curve in curves
    ]


def _handles(styled: Styled) -> list:
    from matplotlib.lines import Line2D

    return [Line2D([], [], **style) for _, style in styled]


def _draw(axis, values: dict[int, float], style: dict) -> None:
    points = sorted(values.items())
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _draw_time(axis, group: Group, styled: Styled) -> None:
    for curve, style in styled:
        _draw(axis, curve.us, style)
    axis.set_yscale("log")
    axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.yaxis.set_major_formatter(_count)
    axis.set(title="Time of a layer", ylabel="microseconds, slowest rank")


def _draw_work(axis, group: Group, styled: Styled) -> None:
    for curve, style in styled:
        _draw(axis, curve.tflops, style)
    axis.set(title="Useful work", ylabel="TFLOP/s per GPU", ylim=(0, None))


def _draw_speedup(axis, group: Group, styled: Styled) -> None:
    styles = {curve.label: style for curve, style in styled}
    for other, ratios in group.speedups():
        _draw(axis, ratios, styles[other.label])
    axis.axhline(1, color="black", linewidth=1)
    axis.set(title="Speed-up of megamoe", ylabel="their time / ours", ylim=(0, None))


def _panels(group: Group) -> list[Callable]:
    """What there is to draw of a group: functions of an axis, the group and its styles."""
    panels = [_draw_time]
    panels += [_draw_work] if any(curve.tflops for curve in group.drawn) else []
    return panels + ([_draw_speedup] if group.speedups() else [])


def _draw_panel(panel: Callable, group: Group, styled: Styled, axis) -> None:
    panel(axis, group, styled)
    _token_axis(axis, group)


def _draw_legend(title: str, styled: Styled, axis) -> None:
    axis.set_axis_off()
    axis.legend(
        handles=_handles(styled), title=title, alignment="left", loc="upper left",
        fontsize=8, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def draw_group(group: Group, styles: Styles) -> Picture:
    """Time, TFLOP/s and speed-up over tokens side by side."""
    panels, styled = _panels(group), _styled(group, styles)
    size = (4.8 * len(panels) + 3, 4.6)
    with _subplots(1, len(panels), figsize=size, squeeze=False) as (figure, axes):
        for axis, panel in zip(axes[0], panels, strict=True):
            _draw_panel(panel, group, styled, axis)
        figure.legend(handles=_handles(styled), loc="outside right center")
        figure.suptitle(group.title)
        return _files(figure, group.slug)


def draw_panels(group: Group, styles: Styles) -> list[bytes]:
    """The same as SVG that fit a phone: the panels, then the legend in up to three parts."""
    styled = _styled(group, styles)
    pictures: list[bytes] = []

    def add(height: float, draw: Callable) -> None:
        with _subplots(figsize=(PAGE_WIDTH, height)) as (figure, axis):
            draw(axis)
            pictures.append(_svg(figure, f"{group.slug}-{len(pictures)}"))

    for panel in _panels(group):
        add(PAGE_WIDTH, partial(_draw_panel, panel, group, styled))
    kinds: dict[str, Styled] = {}
    for curve, style in styled:
        beside = "peers" if curve.peer else "measured beside it"
        kind = "ours, rooflines" if curve.ours or curve in group.bounds else beside
        kinds.setdefault(kind, []).append((curve, style))
    for kind, part in kinds.items():
        add(0.3 + 0.19 * len(part), partial(_draw_legend, kind, part))
    return pictures


def draw_memory(title: str, slug: str, num_bytes: dict[str, int]) -> Picture:
    """Bars of the largest regions, in MiB."""
    names = list(num_bytes)[:REGION_BARS]
    sizes = [num_bytes[name] / 2**20 for name in names]
    rest = sum(num_bytes.values()) / 2**20 - sum(sizes)
    if len(num_bytes) > len(names):
        names, sizes = [*names, f"{len(num_bytes) - len(names)} others"], [*sizes, rest]
    with _subplots(figsize=(PAGE_WIDTH, 0.9 + 0.25 * len(names))) as (figure, axis):
        bars = axis.barh(names, sizes, color=OUR_COLOURS[0])
        axis.bar_label(bars, labels=[f"{size:,.1f}" for size in sizes], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("MiB of one rank")
        figure.suptitle(title, fontsize=9)
        axis.grid(visible=False, axis="y")
        return _files(figure, slug)


def draw_phases(title: str, slug: str, parts: dict[int, dict[str, float]]) -> Picture:
    """A bar per launch, {tokens: {phase: microseconds}}, as shares of its time."""
    names = list(next(iter(parts.values())))
    labels = [f"{tokens:,}" for tokens in parts]
    height = 1.9 + 0.4 * len(parts)
    with _subplots(figsize=(PAGE_WIDTH, height)) as (figure, axis):
        left = [0.0] * len(parts)
        for name, colour in zip(names, PHASE_COLOURS, strict=True):
            shares = [100 * of[name] / sum(of.values()) for of in parts.values()]
            axis.barh(labels, shares, left=left, color=colour, label=name)
            left = [begin + share for begin, share in zip(left, shares, strict=True)]
        axis.invert_yaxis()
        axis.set(xlabel="% of the launch", ylabel="tokens per rank", xlim=(0, 100))
        axis.grid(visible=False)
        figure.suptitle(title, fontsize=9)
        figure.legend(loc="outside lower left", ncols=2, fontsize=8)
        return _files(figure, slug)


def _files(figure, slug: str) -> Picture:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return {"png": png.getvalue(), "svg": _svg(figure, slug)}


def _svg(figure, slug: str) -> bytes:
    """The figure beginning at its own element, naming nothing outside: it can stand in a page. Its
    ids begin with `slug`.
    """
    svg = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=nothing)
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\bid=\"", f'id="{slug}-', text)
    text = re.sub(r"xlink:href=\"#", f'href="#{slug}-', text)
    text = re.sub(r"url\(#", f"url(#{slug}-", text)
    return text.encode()
