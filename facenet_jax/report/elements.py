"""Elements of self-contained HTML pages: sections, figures, pictures, plots, the document. No script, no network."""

import base64
import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = 160

# Plots. They are drawn in stand-in colours that become the page's own, so that one drawing serves light and dark.

INK, LINE, FIRST, SECOND, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
_PAGE_COLOURS = {INK: "currentColor", LINE: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)", THIRD: "var(--third)"}
_PLOT_STYLE: dict[Any, Any] = {
    # Text stays text, in the page's font, and "$" is only a letter.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --line: #d5dae1; --back: #f6f7f9; --card: #fff;
  --first: #2766b0; --second: #c4621d; --third: #2c8a5b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9ba6b5; --line: #3b4452; --back: #14181e; --card: #1c222b;
  --first: #6cabf2; --second: #f09b5c; --third: #62c393; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 3rem; max-width: 1000px; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 1.5rem; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.2rem; }
h3 { margin: 0 0 .25rem; font-size: 1rem; }
section { margin-bottom: 2.25rem; }
p, dl, ul, pre { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(205px, 44%), 1fr)); gap: 1rem; }
.tile, figure, table, pre, .map { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: .9rem 1rem; }
.tile h3, .note, .facts, figcaption, .tile p, dt { color: var(--soft); font-size: .875rem; font-weight: normal; }
.tile .big { color: var(--ink); font-size: 2rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts { margin-top: .75rem; }
.note { margin-bottom: .6rem; }
figcaption { margin-top: .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; min-width: 0; }
figure > svg, .map > svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(210px, 45%), 1fr)); gap: .75rem; margin-bottom: 1.25rem; }
.pair { padding: .6rem; }
.pair div { display: flex; gap: .4rem; }
.pair img { width: 50%; flex: 1; min-width: 0; border-radius: 4px; aspect-ratio: 1; object-fit: cover; }
.pair figcaption { font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere; }
.pair b { color: var(--ink); }
.map { display: flex; flex-wrap: wrap; align-items: center; gap: 1rem; padding: 1rem; }
.map > svg { flex: 3 1 300px; min-width: 0; }
.map ul { flex: 1 1 210px; padding: 0; columns: 9rem; font-size: .85rem; list-style: none; overflow-wrap: anywhere; }
.map li svg { width: .8em; height: .8em; margin-right: .45em; }
table { width: 100%; border-spacing: 0; overflow: hidden; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .75rem; text-align: right; }
th { color: var(--soft); font-weight: normal; }
td { border-top: 1px solid var(--line); }
pre { padding: .75rem 1rem; margin-bottom: .75rem; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre code { display: inline-block; max-width: 100%; }
dd { margin: 0 0 .5rem; font-size: .9rem; overflow-wrap: anywhere; }
""".strip()


def section(title: str, body: str, note: str = "") -> str:
    """A headed part of the page; nothing where the body is empty."""
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{remark}{body}</section>" if body else ""


def figure(title: str, picture: str, caption: str = "") -> str:
    """A picture with a heading and words below it."""
    return f"<figure><h3>{escape(title)}</h3>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def grid(*figures: str) -> str:
    """Figures side by side where there is room; nothing where all are empty."""
    return f'<div class="plots">{"".join(figures)}</div>' if any(figures) else ""


def jpeg(picture: np.ndarray, of: str) -> str:
    """[h, w, 3] uint8 as a data URI."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"a picture of {of} must be [h, w, 3] uint8, not {list(picture.shape)} {picture.dtype}")
    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((PICTURE, PICTURE))
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def plot(label: str, draw: Callable[["Axes"], None], height: float = 3.0) -> str:
    """Inline SVG of what `draw` puts on its axes; label tells what it is to those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    # The salt keeps the ids of one plot apart from those of the next on the page, and the same from run to run.
    with matplotlib.rc_context({**_PLOT_STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=(5, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Matplotlib's file as an element of the page: no links to name spaces, no style that would reach other elements, no fixed size."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head = f'<svg viewBox="\\1" role="img" aria-label="{escape(label)}">'
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', head, svg, count=1).replace("xlink:href", "href")
    # Axes are called axes_1 in every plot, but an id must be the page's only one; nothing refers to these.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return re.sub("|".join(_PAGE_COLOURS), lambda found: _PAGE_COLOURS[found[0]], svg)


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; style: more of it."""
    # The policy makes the browser itself refuse scripts and the network.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    title = escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{_STYLE}{style}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
