"""A comparison as one HTML page: the tables, the picture and where they come from.

The page has no script and loads nothing: styles are inline, the picture is a data URI, every text is escaped.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from diffgap_lightning.evaluation.report import (
    COLUMNS,
    HOW_TO_READ,
    Record,
    by_direction,
    cells,
    heading,
    mark,
    write_atomically,
)

_MARKS = {"*": "best", "+": "above", "-": "below", "": ""}


def write_html(
    path: str | os.PathLike[str], records: Sequence[Record], png: bytes, *, title: str, facts: Mapping[str, object]
) -> Path:
    """Write the page.

    Args:
        path: The file to write.
        records: What to tabulate.
        png: The picture, as the bytes of a PNG file.
        title: Of the page.
        facts: Where the figures come from (command, data, seed, ...), printed as they are.
    """
    return write_atomically(Path(path), render_html(records, png, title=title, facts=facts).encode())


def render_html(records: Sequence[Record], png: bytes, *, title: str, facts: Mapping[str, object]) -> str:
    """The page as a string."""
    return _PAGE.substitute(
        title=_text(title),
        style=_STYLE,
        tables="\n".join(_table(direction, rows) for direction, rows in by_direction(records).items()),
        picture=base64.b64encode(png).decode("ascii"),
        notes="".join(f"<li>{_text(line)}</li>" for line in HOW_TO_READ),
        facts="".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items()),
    )


def _table(direction: str, rows: Sequence[Record]) -> str:
    titles = "".join(f"<th>{_text(title)}</th>" for title, _, _ in COLUMNS)
    span = min(r["r1_ci"][0] for r in rows), max(r["r1_ci"][1] for r in rows)
    body = "\n".join(_row(r, span) for r in rows)
    return (
        f"<h2>{_text(heading(direction, rows[0]))}</h2>\n"
        f'<div class="wide"><table>\n<thead><tr><th>method</th><th></th>{titles}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _row(record: Record, span: tuple[float, float]) -> str:
    figures = "".join(f"<td>{_text(cell)}</td>" for cell in cells(record))
    name = f"{_text(record['method'])}<sup>{_text(mark(record))}</sup>"
    return f'<tr class="{_MARKS[mark(record)]}"><th scope="row">{name}</th><td>{_bar(record, span)}</td>{figures}</tr>'


def _bar(record: Record, span: tuple[float, float], width: int = 150) -> str:
    """R@1 as a dot on its interval, on the scale that all rows of the table share."""
    length = max(span[1] - span[0], 1e-9)
    values = (record["r1_ci"][0], record["r1"], record["r1_ci"][1])
    low, dot, high = (width * (float(v) - span[0]) / length for v in values)
    return (
        f'<svg width="{width + 8}" height="14" viewBox="-4 0 {width + 8} 14" aria-hidden="true">'
        f'<line x1="0" y1="7" x2="{width}" y2="7" class="axis"/>'
        f'<line x1="{low:.1f}" y1="7" x2="{high:.1f}" y2="7" class="span"/>'
        f'<circle cx="{dot:.1f}" cy="7" r="3.5"/></svg>'
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$tables
<h2>The space before and after</h2>
<img alt="$title: the space before and after refinement" src="data:image/png;base64,$picture">
<h2>How to read it</h2>
<ul>$notes</ul>
<h2>Where it comes from</h2>
<dl>$facts</dl>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #667; --line: #ddd; --page: #fff; --dot: #228833; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --soft: #99a; --line: #444; --page: #16181c; --dot: #5fbf74; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; }
tbody th, thead th:first-child { text-align: left; } tbody th { font-weight: 600; }
tr.above th { color: var(--dot); } tr.below th { color: var(--soft); font-weight: 400; }
sup { margin-left: .15rem; }
svg .axis { stroke: var(--line); } svg .span { stroke: var(--soft); stroke-width: 3; } svg circle { fill: var(--dot); }
img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
ul, dl { color: var(--soft); } dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; overflow-wrap: anywhere; }
"""
