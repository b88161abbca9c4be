"""One self-contained page of text, tables and pictures: no scripts, nothing that is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Paragraph", "Picture", "Table", "page"]

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p, figcaption { max-width: 52rem; } figcaption { color: #555; font-size: 0.9rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #999; } th:first-child, td:first-child { text-align: left; }
tr.total td { border-top: 2px solid #999; font-weight: 600; }
.prose td, .prose th { text-align: left; vertical-align: top; }
.prose td:last-child { white-space: pre-wrap; font-family: ui-monospace, monospace; }
"""


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Plain text under an optional heading."""

    text: str
    heading: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first column is flush left, the last row may be a total, the last column prose with lines of its own."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: str = ""
    total: bool = False
    prose: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG with its caption, which also describes it to those who do not see it."""

    png: bytes
    caption: str
    heading: str = ""


def page(title: str, parts: Sequence[Paragraph | Table | Picture]) -> str:
    """The page; all text is escaped."""
    body = "\n".join(_part(part) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def _part(part: Paragraph | Table | Picture) -> str:
    heading = f"<h2>{escape(part.heading)}</h2>\n" if part.heading else ""
    if isinstance(part, Paragraph):
        return f"{heading}<p>{escape(part.text)}</p>"
    if isinstance(part, Picture):
        data, caption = base64.b64encode(part.png).decode(), escape(part.caption)
        source = f"data:image/png;base64,{data}"
        return f'{heading}<figure><img src="{source}" alt="{caption}">\n<figcaption>{caption}</figcaption></figure>'
    head = "".join(f"<th>{escape(column)}</th>" for column in part.columns)
    last, kind = len(part.rows) - 1, " class=prose" if part.prose else ""
    rows = "\n".join(
        f"<tr{' class=total' if part.total and number == last else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(part.rows)
    )
    return f'{heading}<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'
