"""Curves as pictures, by matplotlib (the extra `report`), which is imported only when one is drawn.

A curve is told apart by colour, marker and line style at once; the colours are those of Okabe and
Ito, which remain distinct for colour-blind readers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import contextmanager

from perf.curves import Curve, Group

#: Blue and vermillion are ours; the order of the rest keeps neighbours far apart.
OUR_COLOURS = ("#0072B2", "#D55E00", "#000000")
COLOURS = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666", "#332288", "#882255")
OUR_MARKERS, MARKERS = "oD*", "s^vPX<>hd"
BOUND_STYLES = ("--", ":", "-.")

STYLE = {
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
        raise ValueError(f"plots need {error.name}: pip install 'megamoe[report]'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained", figsize=kwargs.pop("figsize"))
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(*args, **kwargs)


def _count(value: float, position: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _token_axis(axis, tokens: Sequence[int]) -> None:
    """Powers of two at the token counts themselves, at most nine of them."""
    axis.set_xscale("log", base=2)
    step = -(-len(tokens) // 9)
    axis.set_xticks(tokens[::-1][::step], [f"{t:,}" for t in tokens[::-1][::step]])
    axis.tick_params(axis="x", rotation=45)
    axis.minorticks_off()
    axis.set_xlabel("tokens per rank")


def _styles(group: Group) -> list[tuple[Curve, dict]]:
    """Every drawn curve with its colour, marker and line."""
    mine = iter(zip(OUR_COLOURS * 3, OUR_MARKERS * 3, strict=True))
    rest = iter([(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(64)])
    styled = []
    for curve in group.drawn:
        colour, marker = next(mine if curve.ours else rest)
        style = {"color": colour, "marker": marker, "markersize": 5, "label": curve.label}
        if curve.peer:
            style |= {"linestyle": ":", "markerfacecolor": "white"}
        style["linewidth"] = 2.2 if curve.ours else 1.3
        styled.append((curve, style))
    for bound, line in zip(group.bounds, BOUND_STYLES * 3, strict=False):
        styled.append((bound, {"color": "black", "linestyle": line, "label": bound.label}))
    return styled


def _draw(axis, values: dict[int, float], style: dict) -> None:
    points = sorted(values.items())
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def draw_group(group: Group) -> dict[str, bytes]:
    """Time, TFLOP/s and speed-up over tokens: {"svg": ..., "png": ...}."""
    tokens = sorted({t for curve in group.drawn for t in curve.us})
    speedups = group.speedups()
    on_gpu = any(curve.tflops for curve in group.drawn)
    panels = 1 + on_gpu + bool(speedups)
    with _subplots(1, panels, figsize=(4.8 * panels + 3, 4.6), squeeze=False) as (figure, axes):
        remaining = iter(axes[0])
        styled = _styles(group)
        axis = next(remaining)
        for curve, style in styled:
            _draw(axis, curve.us, style)
        axis.set_yscale("log")
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.yaxis.set_major_formatter(_count)
        axis.set(title="Time of a layer", ylabel="microseconds, slowest rank")
        if on_gpu:
            axis = next(remaining)
            for curve, style in styled:
                _draw(axis, curve.tflops, style)
            axis.set(title="Useful work", ylabel="TFLOP/s per GPU", ylim=(0, None))
        if speedups:
            axis = next(remaining)
            styles = {curve.label: style for curve, style in styled}
            for other, ratios in speedups:
                _draw(axis, ratios, styles[other.label])
            axis.axhline(1, color="black", linewidth=1)
            axis.set(title="Speed-up of megamoe", ylabel="their time / ours", ylim=(0, None))
        for axis in axes[0]:
            _token_axis(axis, tokens)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(group.title)
        return _files(figure, group.slug)


def draw_memory(title: str, slug: str, num_bytes: dict[str, int]) -> dict[str, bytes]:
    """Bars of the largest regions, in MiB: {"svg": ..., "png": ...}."""
    names = list(num_bytes)[:REGION_BARS]
    sizes = [num_bytes[name] / 2**20 for name in names]
    rest = sum(num_bytes.values()) / 2**20 - sum(sizes)
    if len(num_bytes) > len(names):
        names, sizes = [*names, f"{len(num_bytes) - len(names)} others"], [*sizes, rest]
    with _subplots(figsize=(8, 0.9 + 0.35 * len(names))) as (figure, axis):
        bars = axis.barh(names, sizes, color=OUR_COLOURS[0])
        axis.bar_label(bars, labels=[f"{size:,.1f}" for size in sizes], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=title, xlabel="MiB of one rank")
        axis.grid(visible=False, axis="y")
        return _files(figure, slug)


def _files(figure, slug: str) -> dict[str, bytes]:
    """The figure in both formats. The SVG begins at its own element and names nothing outside: it
    can stand in a page; its ids begin with `slug`.
    """
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=130)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=nothing)
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\bid=\"", f'id="{slug}-', text)
    text = re.sub(r"xlink:href=\"#", f'href="#{slug}-', text)
    text = re.sub(r"url\(#", f"url(#{slug}-", text)
    return {"png": png.getvalue(), "svg": text.encode()}
