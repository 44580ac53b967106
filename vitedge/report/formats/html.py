"""One HTML page with everything in it: sortable tables, plots, pictures. It opens offline, and nothing it holds can reach a network.

Its Content-Security-Policy allows no connection of any kind, and of scripts only the three that stand in it, by their
hash: a label that is taken for a script stays text. Plotly's library is in it whole, packed to a quarter of its size, and runs
once the page is loaded.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import textwrap
from typing import TYPE_CHECKING

from vitedge.errors import extra_missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitedge.report.figures import Figure
    from vitedge.report.grids import Grid, Head, Shown
    from vitedge.report.pictures import Picture
    from vitedge.report.records import Table

SUFFIX = ".html"
LONG = 60  # characters from which a cell is folded


def render(table: Table, width: int) -> str:
    """The report as a page.

    Raises:
        UnavailableError: Plotly is not installed.
    """
    plotly = _plotly()
    from vitedge.report.comparable import grouped
    from vitedge.report.figures import figures
    from vitedge.report.grids import grids
    from vitedge.report.pictures import load_pictures

    drawn, damaged = figures(table)
    pictures, not_shown = load_pictures(table)
    tables = grids(table)
    warned = grouped(table.rows)
    warned += [("not read", [problem]) for problem in (*table.problems, *damaged)]
    warned += [("left out", [line]) for line in (*table.left_out, *not_shown)]
    sections = [(grid.name, grid.title, _grid(grid)) for grid in tables]
    plots = {"plots": "Accuracy against speed and size", "latencies": "Latencies", "curves": "Training curves"}
    kinds = {"pareto": "plots", "latency": "latencies", "curves": "curves"}
    for name, title in plots.items():
        own = [figure for figure in drawn if kinds[figure.name.split("-")[0]] == name]
        if own:
            sections.append((name, title, f'<div class="plots">{"".join(_figure(figure) for figure in own)}</div>'))
    if pictures:
        sections.append(("pictures", "The papers' figures", f'<div class="plots">{"".join(_picture(one) for one in pictures)}</div>'))
    elif build := next((path for path in table.builds if path.is_dir()), None):
        how = f"Importance, LayerNorm ranges and attention of a build: vitedge inspect {build} draws them, and the next report has them."
        sections.append(("pictures", "The papers' figures", f'<p class="soft">{_text(how)}</p>'))
    sections.append(("conditions", "Conditions", _conditions(table)))
    body = f"{_header(table, sections)}<main>{_noscript()}{_warnings(warned)}"
    body += "".join(f'<section id="{name}"><h2>{_text(title)}</h2>{inner}</section>' for name, title, inner in sections)
    body += f'</main><footer class="soft"><p id="said" role="status"></p><p>{_made()}</p></footer>'
    return _page(table.title, body, _data(drawn), plotly, [_asset("tables.js"), _asset("plots.js")])


def _plotly() -> str:
    """Plotly's library, whole.

    Raises:
        UnavailableError: It is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise extra_missing("vitedge report --format html", "report") from error
    library: str = get_plotlyjs()
    return library


def _asset(name: str) -> str:
    from importlib.resources import files

    return (files("vitedge.report") / "assets" / name).read_text(encoding="utf-8")


def _page(title: str, body: str, data: str, library: str, scripts: Sequence[str]) -> str:
    # A browser ends a script at the first closing tag, and hashes what is left after turning line ends into \n.
    library, *safe = [_inline(script) for script in (library, *scripts)]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in (library, *safe))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{_text(title)}</title>\n<link rel="icon" href="data:,">',
            f"<style>\n{_asset('report.css')}</style>\n</head>\n<body>",
            body,
            f'<script type="application/json" id="figures">{data}</script>',
            f'<script type="text/plain" id="plotly">{_packed(library)}</script>',
            *(f"<script>{script}</script>" for script in safe),
            "</body>\n</html>\n",
        ]
    )


def _packed(script: str) -> str:
    """The script deflated and in base64, of which nothing could be taken for a tag; the same bytes for the same script."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode("ascii")


def _inline(script: str) -> str:
    """The script as it can stand between its tags; both replacements mean the same inside a string."""
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _data(drawn: Sequence[Figure]) -> str:
    """The figures as JSON in which no tag can begin or end."""
    text = json.dumps([{"name": f.name, "traces": f.traces, "layout": f.layout, "height": f.height} for f in drawn], allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _header(table: Table, sections: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{_text(title)}</a>' for name, title, _ in sections)
    labels = sum(row.measurement is not None for row in table.rows)
    missing = len(table.rows) - labels
    counts = f"{labels} measurements{f', {missing} not measured' if missing else ''}"
    baseline = "; ".join(table.baselines()) or "none"
    head = f'<header><h1>{_text(table.title)}</h1><p class="soft">{counts}. Baseline: {_text(baseline)}.</p>'
    return f'{head}<nav aria-label="Sections">{links}</nav></header>'


def _noscript() -> str:
    return "<noscript><p>The tables are complete without JavaScript; sorting, filtering and the plots need it.</p></noscript>"


def _made() -> str:
    import vitedge

    return (
        f"Made by vitedge {_text(vitedge.__version__)}. <code>same</code> is a difference inside the noise: its 95 % interval covers none."
    )


def _warnings(warned: Sequence[tuple[str, Sequence[str]]]) -> str:
    if not warned:
        return ""
    lines = "".join(f"<li>{_warning(text, names)}</li>" for text, names in warned)
    return f'<aside class="warnings" aria-label="Warnings"><h2>Read with care</h2><ul>{lines}</ul></aside>'


def _warning(text: str, names: Sequence[str]) -> str:
    """A warning and its rows, folded where they are many."""
    from vitedge.report.comparable import MOST_NAMES

    said = f"<strong>{_text(text)}</strong>"
    if len(names) <= MOST_NAMES:
        return f"{said}: {_text(', '.join(names))}"
    return f"<details><summary>{said}: {len(names)} rows</summary>{_text(', '.join(names))}</details>"


def _grid(grid: Grid) -> str:
    """A table in a box of its own that scrolls, by keyboard too."""
    heads = "".join(_head(head) for head in grid.heads)
    tags = grid.tags or ({},) * len(grid.lines)
    lines = "".join(_line(grid.heads, line, tag) for line, tag in zip(grid.lines, tags, strict=True))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
    label = f'role="region" tabindex="0" aria-label="{_text(grid.title)}"'
    return f'<p class="soft">{_text(grid.note)}</p>{_filters(grid)}<div class="scroll" {label}>{table}</div>'


def _filters(grid: Grid) -> str:
    """Words and what the rows are tagged with; shown by the script that makes them work."""
    if not grid.tags:
        return ""
    selects = ""
    for name in grid.tags[0]:
        values = sorted({tag[name] for tag in grid.tags if tag[name]})
        options = "".join(f'<option value="{_text(value)}">{_text(value)}</option>' for value in values)
        selects += f'<label>{name}<select name="{name}"><option value="">all</option>{options}</select></label>'
    words = '<label>words<input type="search" id="filter-text" autocomplete="off" spellcheck="false"></label>'
    count = '<output id="shown" class="soft"></output>'
    return f'<form id="filters" class="filters" role="search" hidden>{words}{selects}<input type="reset" value="show all">{count}</form>'


def _head(head: Head) -> str:
    kind = ' class="num"' if head.numeric else ""
    return f'<th scope="col" aria-sort="none"{kind} title="{_text(head.doc)}"><button type="button">{_text(head.title)}</button></th>'


def _line(heads: Sequence[Head], line: Sequence[Shown], tag: dict[str, str]) -> str:
    data = "".join(f' data-{name}="{_text(value)}"' for name, value in tag.items())
    cells = "".join(_cell(head, shown, first=index == 0) for index, (head, shown) in enumerate(zip(heads, line, strict=True)))
    return f"<tr{data}>{cells}</tr>"


def _cell(head: Head, shown: Shown, first: bool) -> str:
    inner = _text(shown.text)
    inner += f' <span class="note">{_text(shown.note)}</span>' if shown.note else ""
    inner += f' <span class="paper">paper {_text(shown.paper)}</span>' if shown.paper else ""
    if first:
        return f'<th scope="row">{inner}</th>'
    if head.numeric:
        order = "" if shown.order is None else f' data-order="{shown.order!r}"'
        return f'<td class="num"{order}>{inner}</td>'
    if len(shown.text) > LONG:
        beginning = _text(textwrap.shorten(shown.text, LONG, placeholder=" ..."))
        return f'<td class="text long"><details><summary>{beginning}</summary>{inner}</details></td>'
    return f'<td class="text">{inner}</td>'


def _figure(figure: Figure) -> str:
    # The height is kept free, so that nothing jumps while the plots are drawn.
    plot = f'<div class="plot" id="{figure.name}" style="height: {figure.height}px"></div>'
    caption = f"<figcaption><strong>{_text(figure.title)}</strong>"
    return f'<figure>{caption}<span class="soft">{_text(figure.note)}</span></figcaption>{plot}</figure>'


def _picture(picture: Picture) -> str:
    image = (
        f'<img src="{picture.uri}" width="{picture.width}" height="{picture.height}" alt="{_text(f"{picture.title}: {picture.caption}")}">'
    )
    return (
        f'<figure class="picture"><figcaption><strong>{_text(picture.title)}</strong>{_text(picture.caption)}</figcaption>{image}</figure>'
    )


def _conditions(table: Table) -> str:
    from vitedge.report.comparable import conditions_of

    runs = ["".join(f"<li>{_text(line)}</li>" for line in lines) for lines in conditions_of(table.rows)]
    return f'<div class="conditions">{"".join(f"<ul>{run}</ul>" for run in runs) or "<p>Nothing was measured.</p>"}</div>'
