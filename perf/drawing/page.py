"""The page of a report: HTML with its pictures inside, which needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from perf.drawing.curves import Curve, Group, is_known, memory_of, name_of, shape_of
from perf.drawing.plots import Picture, Styles, draw_panels, styles_of
from perf.tracing.phases import sections_of

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
h1, h2 { line-height: 1.2 }
table { border-collapse: collapse; margin: .5rem 0; font-size: .85rem; display: block;
        overflow-x: auto }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ccc; text-align: right;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
th[scope=rowgroup] { padding-top: .8rem }
summary { cursor: pointer }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin: 1rem 0 }
figure { margin: 0; max-width: 100% } svg { display: block; max-width: 100%; height: auto }
@media (max-width: 40rem) { table { font-size: .8rem } th, td { padding: .2rem .35rem } }
"""


def html_table(titles: Sequence[str], parts: Mapping[str, Iterable[Sequence[object]]]) -> str:
    """A table of {heading or "": rows}; every cell is escaped, "" stands for what was not
    measured.
    """
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    bodies = []
    for heading, rows in parts.items():
        lines = [
            "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in rows
        ]
        if heading:
            span = f'<th scope="rowgroup" colspan="{len(titles)}">'
            lines.insert(0, f"<tr>{span}{escape(heading)}</th></tr>")
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    return f"<table><thead><tr>{head}</tr></thead>\n{''.join(bodies)}</table>"


def html_details(summary: str, content: str) -> str:
    """Content that is shown on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def html_picture(svg: bytes, label: str) -> str:
    """The picture inside the page, where an <svg> needs no namespaces."""
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg.decode())
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def group_rows(group: Group) -> dict[str, list[tuple[str, ...]]]:
    """Lines of the table of a group, by implementation: tokens, time, TFLOP/s, share of the
    roofline, speed-up of ours over this one in the same precision, with the L2 in the same state.
    """

    def speedup(curve: Curve, tokens: int) -> float | None:
        ours = [c.us[tokens] for c in group.curves if c.faces(curve) and tokens in c.us]
        return curve.us[tokens] / min(ours) if ours else None

    bounds = {bound.precision: bound.us for bound in group.bounds}
    lines: dict[str, list[tuple[str, ...]]] = {}
    for curve in group.curves:
        for tokens, us in curve.us.items():
            bound = bounds.get(curve.precision, {}).get(tokens)
            share = None if bound is None or curve.part else bound / us
            lines.setdefault(curve.label, []).append(
                (
                    f"{tokens:,}",
                    _number(us),
                    _number(curve.tflops.get(tokens)),
                    _number(share, 2),
                    _number(speedup(curve, tokens), 2),
                )
            )
    return lines


ROW_TITLES = ("tokens per rank", "us", "TFLOP/s per GPU", "share of the roofline",
              "our speed-up over it")  # fmt: skip


def environment_rows(*frames) -> list[tuple[object, ...]]:
    """Lines of the table of environments: where and from what source rows were measured."""
    import pandas

    columns = ["gpu", "driver", "torch", "dsl", "commit", "dirty"]
    text = pandas.concat([frame for frame in frames if len(frame)]).fillna(
        {"dirty": -1, "driver": "", "dsl": ""}
    )
    lines: list[tuple[object, ...]] = []
    for (gpu, driver, torch, dsl, commit, dirty), rows in text.groupby(columns, sort=False):
        known = {"": gpu, "driver ": driver, "torch ": torch, "DSL ": dsl}
        lines.append(
            (
                ", ".join(f"{name}{value}" for name, value in known.items() if value),
                str(commit)[:7] + (" and changes" if dirty == 1 else ""),
                len(rows),
                " to ".join(
                    dict.fromkeys(date[:10] for date in (rows.date.min(), rows.date.max()))
                ),
            )
        )
    return lines


ENVIRONMENT_TITLES = ("machine", "commit", "rows", "measured")


def memory_sections(groups: Sequence[Group]) -> dict[str, tuple[str, dict[str, int]]]:
    """{slug: (title, {region: bytes})}, one per layer, number of ranks and precision."""
    sections: dict[str, tuple[str, dict[str, int], int]] = {}
    for group in groups:
        for precision in dict.fromkeys(curve.precision for curve in group.curves if curve.ours):
            m, tokens = group.model, max(group.tokens)
            name = f"memory-{name_of(m)}-ep{group.num_ranks}-{precision}"
            if name in sections and sections[name][2] >= tokens:
                continue
            try:
                regions = memory_of(m, group.num_ranks, precision, tokens)
            except ValueError:  # rows of a precision or shape that this source does not have
                continue
            named = is_known(m) and not m.num_shared_experts
            layer = m.name if named else f"{m.name} {shape_of(m)}"
            title = f"{layer}, EP{group.num_ranks}, {precision}, room for {tokens:,} tokens"
            sections[name] = (title, regions, tokens)
    return {slug: (title, regions) for slug, (title, regions, _) in sections.items()}


def phase_table(launches: dict[int, dict[str, float]]) -> str:
    """A line per phase, a column per number of tokens."""
    titles = ("us, by tokens per rank", *(f"{tokens:,}" for tokens in launches))
    names = next(iter(launches.values()))
    rows = [(name, *(_number(times[name]) for times in launches.values())) for name in names]
    launch = ("launch", *(_number(sum(times.values())) for times in launches.values()))
    return html_table(titles, {"": [*rows, launch]})


def html_group(group: Group, styles: Styles) -> str:
    """The section of a group: panels, their legend, the points."""
    parts = [f'<section id="{group.slug}"><h2>{escape(group.title)}</h2>']
    if not any(curve.tflops for curve in group.curves):
        parts.append("<p>Times of a CPU that executes the kernel's PTX: no GPU figures.</p>")
    panels = "".join(html_picture(svg, group.title) for svg in draw_panels(group, styles))
    parts.append(f'<div class="row">{panels}</div>')
    parts.append(html_details("The figures", html_table(ROW_TITLES, group_rows(group))))
    return "".join([*parts, "</section>"])


def html_phases(sections: dict, pictures: dict[str, Picture]) -> str:
    """The section of recorded launches."""
    parts = []
    for slug, (title, launches) in sections.items():
        parts += [html_picture(pictures[slug]["svg"], title), phase_table(launches)]
    text = (
        "One launch each, after others and a pause of about 2 ms; mean over CTAs. Rows are pulled "
        "under the products, and FC2 sends its results from the epilogues."
        if parts
        else "No launch was recorded: `python -m perf trace --phases FILE.csv` writes one."
    )
    return (
        f'<section id="phases"><h2>Where the time goes</h2><p>{text}</p>'
        f'<div class="row">{"".join(parts)}</div></section>'
    )


def html_memory(sections: dict, pictures: dict[str, Picture]) -> str:
    """The section of the workspace."""
    parts = []
    for slug, (title, regions) in sections.items():
        total = sum(regions.values())
        rows = [(name, f"{size:,}", f"{size / total:.1%}") for name, size in regions.items()]
        table = html_table(("region", "bytes", "share"), {"": rows})
        parts.append(
            f"<figure>{html_picture(pictures[slug]['svg'], title)}"
            f"{html_details(f'{total / 2**20:,.1f} MiB per rank', table)}</figure>"
        )
    return (
        '<section id="memory"><h2>Memory by region</h2>'
        f'<div class="row">{"".join(parts)}</div></section>'
    )


def page_of(
    frame, launches, groups: Sequence[Group], memory: dict, pictures: dict[str, Picture]
) -> str:
    """The whole page, of result rows and recorded launches; `pictures` of phases and memory."""
    styles = styles_of(groups)
    links = {group.slug: group.title for group in groups}
    links |= {"phases": "Where the time goes", "memory": "Memory", "environment": "Environment"}
    items = "".join(
        f'<li><a href="#{slug}">{escape(title)}</a></li>' for slug, title in links.items()
    )
    parts = [
        "<h1>MegaMoE measurements</h1>",
        f"<p>{len(frame)} rows. Times are medians of the slowest rank; TFLOP/s count useful work. "
        "Of a point measured several times the latest counts. Peers (dotted) are other "
        "implementations' published or re-measured figures.</p>",
        f"<nav><ul>{items}</ul></nav>",
        *(html_group(group, styles) for group in groups),
        html_phases(sections_of(launches), pictures),
        html_memory(memory, pictures),
        '<section id="environment"><h2>Environment</h2>',
        html_table(ENVIRONMENT_TITLES, {"": environment_rows(frame, launches)}),
        "</section>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MegaMoE measurements</title><style>{STYLE}</style></head>\n"
        "<body>" + "\n".join(parts) + "</body></html>\n"
    )
