"""One self-contained HTML page about an evaluation: its numbers, its curves, the worst mistakes, a map of people. No script, no network."""

import base64
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from facenet_jax.evaluation.pairs import Verification, roc

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAP_PEOPLE, MAP_POINTS, MAP_LEAST = 20, 600, 5
PICTURE = 160
CURVE_POINTS = 400


@dataclass(frozen=True)
class Mistake:
    """One pair on the wrong side of its fold's threshold. first, second: [h, w, 3] uint8 RGB; caption: the two keys."""

    first: np.ndarray
    second: np.ndarray
    same: bool
    distance: float
    threshold: float
    caption: str


@dataclass(frozen=True)
class Report:
    """What the page shows; whatever is empty is left out.

    Attributes:
        distances, same: [p] float and [p] bool, without mean subtraction, of the pairs whose images are all there.
        mistakes: worst first.
        metrics: lines of metrics.jsonl.
        embeddings, people: [n, d] float and [n] names, for the map.
        command: shown, so that anybody can repeat it.
        details: more to show by name, such as the fingerprint of the weights.
    """

    title: str
    verification: Verification
    distances: np.ndarray
    same: np.ndarray
    mistakes: tuple[Mistake, ...]
    metrics: tuple[dict[str, Any], ...]
    embeddings: np.ndarray
    people: np.ndarray
    command: str = ""
    details: dict[str, str] = field(default_factory=dict)


def write(path: Path, report: Report) -> None:
    """Writes the page, whole or not at all. ValueError where a picture is not [h, w, 3] uint8."""
    page = _page(report)
    aside = path.with_name(f".{path.name}.writing")
    try:
        # Names may come from a file system that is not UTF-8; one odd letter must not cost the report.
        aside.write_text(page, encoding="utf-8", errors="replace")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def worst_pairs(
    distances: np.ndarray, same: np.ndarray, fold: np.ndarray, fold_thresholds: Sequence[float], count: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the false accepts and of the false rejects, at most `count` each, furthest from the threshold of their fold first.

    distances [p] float, same [p] bool, fold [p] int, fold_thresholds by fold. A pair is accepted where distance < threshold.
    """
    thresholds = np.asarray(fold_thresholds, np.float64)[fold]
    margin = distances - thresholds
    accepts = np.flatnonzero(~same & (distances < thresholds))
    rejects = np.flatnonzero(same & (distances >= thresholds))
    # The distance breaks ties, which infinite thresholds make of all pairs.
    accepts = accepts[np.lexsort((distances[accepts], margin[accepts]))]
    rejects = rejects[np.lexsort((-distances[rejects], -margin[rejects]))]
    return accepts[:count], rejects[:count]


# Text and numbers.


def _number(value: float) -> str:
    return f"{value:#.4g}" if math.isfinite(value) else {math.inf: "∞", -math.inf: "−∞"}.get(value, "–")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if math.isfinite(share) else "–"


def _section(title: str, body: str, note: str = "") -> str:
    """A headed part of the page; nothing where the body is empty."""
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{remark}{body}</section>" if body else ""


def _figure(title: str, picture: str, caption: str = "") -> str:
    return f"<figure><h3>{escape(title)}</h3>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _headline(found: Verification) -> str:
    covered = (found.pairs - found.missing) / max(found.pairs, 1)
    missing = f"{found.missing:,} lack an image and count as wrong ({_percent(covered)} covered)" if found.missing else "no image missing"
    tiles = (
        ("Accuracy", _percent(found.accuracy), f"± {_percent(found.accuracy_sem)} standard error; std {_percent(found.accuracy_std)}"),
        ("VAL", _percent(found.val), f"± {_percent(found.val_std)} std, at FAR {_percent(found.far)} (target {100 * found.far_target:g}%)"),
        ("AUC", f"{found.auc:.4f}", "area under the ROC curve"),
        ("EER", _percent(found.eer), "false accepts equal false rejects"),
    )
    shown = "".join(f'<div class="tile"><h3>{name}</h3><p class="big">{value}</p><p>{note}</p></div>' for name, value, note in tiles)
    facts = [f"{found.pairs:,} pairs in {found.folds} folds", missing, f"{found.distance} distance", f"{found.mode} mode"]
    facts += ["mean subtracted"] if found.mean_subtraction else []
    return f'<section><div class="tiles">{shown}</div><p class="facts">{escape(" · ".join(facts))}</p></section>'


def _folds(found: Verification) -> str:
    columns = zip(found.fold_accuracies, found.fold_thresholds, found.fold_val_thresholds, strict=True)
    rows = "".join(
        f"<tr><td>{fold}</td><td>{_percent(accuracy)}</td><td>{_number(threshold)}</td><td>{_number(val_threshold)}</td></tr>"
        for fold, (accuracy, threshold, val_threshold) in enumerate(columns, 1)
    )
    head = "<tr><th>Fold</th><th>Accuracy</th><th>Threshold</th><th>VAL threshold</th></tr>"
    note = "Each fold is tested at thresholds chosen on the others: one for accuracy, one for the FAR target."
    return _section("Folds", f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else "", note)


def _origin(report: Report) -> str:
    terms = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd>" for name, value in report.details.items())
    # A flag is not broken after its hyphens: each word is a box of its own.
    words = " ".join(f"<code>{escape(word)}</code>" for word in report.command.split())
    command = f"<pre>{words}</pre>" if words else ""
    return _section("How to repeat this", command + (f"<dl>{terms}</dl>" if terms else ""))


# Pictures of mistakes.


def _jpeg(picture: np.ndarray, of: str) -> str:
    """[h, w, 3] uint8 as a data URI."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"a picture of {of} must be [h, w, 3] uint8, not {list(picture.shape)} {picture.dtype}")
    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((PICTURE, PICTURE))
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _mistake(mistake: Mistake) -> str:
    pictures = "".join(f'<img src="{_jpeg(picture, mistake.caption)}" alt="">' for picture in (mistake.first, mistake.second))
    relation = "≥" if mistake.same else "<"
    measured = f"<b>{_number(mistake.distance)}</b> {escape(relation)} {_number(mistake.threshold)}"
    # Keys are long words; they had better break after the name's directory than anywhere.
    caption = escape(mistake.caption).replace("/", "/<wbr>")
    return f'<figure class="pair"><div>{pictures}</div><figcaption>{measured}<br>{caption}</figcaption></figure>'


def _mistakes(mistakes: Iterable[Mistake]) -> str:
    every = tuple(mistakes)
    kinds = (
        (False, "False accepts: different people taken for one", "Distance < threshold of the fold, worst first."),
        (True, "False rejects: one person taken for two", "Distance ≥ threshold of the fold, worst first."),
    )
    body = ""
    for same, title, note in kinds:
        pairs = "".join(_mistake(mistake) for mistake in every if mistake.same == same)
        body += f'<h3>{title}</h3><p class="note">{escape(note)}</p><div class="pairs">{pairs}</div>' if pairs else ""
    return _section("Worst mistakes", body)


# Plots. They are drawn in stand-in colours that become the page's own, so that one drawing serves light and dark.

_INK, _LINE, _FIRST, _SECOND, _THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
_PAGE_COLOURS = {_INK: "currentColor", _LINE: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)", _THIRD: "var(--third)"}
_PLOT_STYLE: dict[Any, Any] = {
    # Text stays text, in the page's font, and "$" is only a letter.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
_PEOPLE_COLOURS = ("#4477cc", "#dd7733", "#2f9e62", "#c94f6d", "#8a63c9", "#a0772b", "#2a9fb5", "#d1539f", "#7f8c2f", "#808896")
_PEOPLE_MARKERS = "os^DvPX"


def _plot(label: str, draw: Callable[["Axes"], None], height: float = 3.0) -> str:
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


def _roc_plot(report: Report) -> str:
    """TAR over FAR; nothing where one of the two kinds of pairs is missing."""
    found, different = report.verification, int((~report.same).sum())
    if not different or different == len(report.same):
        return ""
    far, tar = roc(report.distances, report.same)
    least = min(1 / different, 0.5)

    def draw(axes: "Axes") -> None:
        # No logarithm of 0: the part of the curve without false accepts lies left of the plot.
        axes.step(np.maximum(far, least / 10), tar, where="post", color=_FIRST)
        if least <= found.far_target <= 1:
            axes.axvline(found.far_target, color=_INK, linestyle=":", linewidth=1, label=f"FAR target {found.far_target:g}")
        if least <= found.far <= 1:
            axes.errorbar(found.far, found.val, found.val_std, fmt="o", markersize=5, capsize=3, color=_SECOND, label="VAL ± std of folds")
        axes.set(xscale="log", xlim=(least, 1), ylim=(0, 1.03), xlabel="false accept rate", ylabel="true accept rate")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower right")

    few = f" {different:,} different pairs cannot show a FAR of {found.far_target:g}." if found.far_target < least else ""
    return _figure("ROC", _plot("ROC curve", draw), f"Share of same pairs accepted over share of different pairs accepted.{few}")


def _histogram_plot(report: Report) -> str:
    """Distances of same and of different pairs."""
    if not len(report.distances):
        return ""
    found = report.verification
    edges = np.histogram_bin_edges(report.distances, bins=int(np.clip(math.sqrt(len(report.distances)), 5, 60)))
    threshold = statistics.median(found.fold_thresholds) if found.fold_thresholds else math.nan

    def draw(axes: "Axes") -> None:
        for name, group, colour in (("same", report.same, _FIRST), ("different", ~report.same, _SECOND)):
            if group.any():
                heights = np.histogram(report.distances[group], edges)[0] / group.sum()
                axes.stairs(heights, edges, fill=True, alpha=0.35, color=colour)
                axes.stairs(heights, edges, color=colour, linewidth=1.2, label=f"{name} ({group.sum():,})")
        if math.isfinite(threshold):
            axes.axvline(threshold, color=_INK, linestyle=":", linewidth=1, label=f"median threshold {threshold:.3g}")
        axes.set(xlabel=f"{found.distance} distance", ylabel="share of pairs")
        axes.set_ylim(bottom=0)
        # Above the plot: inside, it would hide one of the two humps.
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, handlelength=1.2, columnspacing=1.2)

    return _figure("Distances", _plot("Histogram of distances", draw), "The less the two overlap, the better.")


_CURVES = (
    ("Loss", "train", ("loss", "triplet_loss", "softmax_loss"), "Of the batch."),
    (
        "Shares",
        "train",
        ("active", "classified", "spread"),
        "Active: pairs with a positive loss; classified: right people; spread: 0 where all embeddings are one.",
    ),
    ("Distances in the batch", "train", ("positive", "negative"), "Mean to positives and to the mined negatives."),
    ("Images per second", "train", ("images_per_s",), "All devices together."),
    ("Evaluation", "evaluation", ("accuracy", "val"), "On the validation pairs."),
)


def _series(metrics: Iterable[dict[str, Any]], kind: str, name: str) -> np.ndarray:
    """[k, 2] steps and values of one metric where it is finite, as means of neighbours where there are more than can be seen."""
    pairs = [(line.get("step"), line.get(name)) for line in metrics if line.get("kind") == kind]
    finite = [pair for pair in pairs if all(isinstance(value, int | float) and math.isfinite(value) for value in pair)]
    points = np.asarray(finite, np.float64).reshape(-1, 2)
    return np.stack([part.mean(0) for part in np.array_split(points, CURVE_POINTS)]) if len(points) > CURVE_POINTS else points


def _curve_plot(metrics: Iterable[dict[str, Any]], title: str, kind: str, names: Iterable[str], caption: str) -> str:
    """Some metrics over steps; those that are not there, or repeat another (a loss of one part), are left out."""
    series: dict[str, np.ndarray] = {}
    for name in names:
        points = _series(metrics, kind, name)
        if len(points) and not any(np.array_equal(points, drawn) for drawn in series.values()):
            series[name] = points
    if not series:
        return ""

    def draw(axes: "Axes") -> None:
        for (name, points), colour in zip(series.items(), (_FIRST, _SECOND, _THIRD), strict=False):
            # A line through one point is nothing.
            marker = "o" if len(points) <= 30 else ""
            axes.plot(points[:, 0], points[:, 1], color=colour, marker=marker, markersize=3.5, label=name.replace("_", " "))
        from matplotlib.ticker import MaxNLocator

        axes.set(xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if len(series) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, handlelength=1.2)

    return _figure(title, _plot(f"{title} over steps", draw, height=2.5), caption)


def _choose_people(people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows for the map, and of each the rank of its person: [k] int both. The people with most images, the same bound on each."""
    names, counts = np.unique(people, return_counts=True)
    chosen = names[np.argsort(-counts, kind="stable")[:MAP_PEOPLE]]
    rows = [np.flatnonzero(people == name)[: MAP_POINTS // len(chosen)] for name in chosen]
    return np.concatenate(rows), np.repeat(np.arange(len(chosen)), [len(part) for part in rows])


def _flatten(embeddings: np.ndarray) -> np.ndarray:
    """[k, d] to [k, 2], neighbours staying neighbours; the same every time."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # A random start, for the usual one (principal components) fails where embeddings have one dimension or are all the same.
    tsne = TSNE(2, perplexity=min(30, (len(embeddings) - 1) / 3), init="random", random_state=0)
    # One thread: the sums come in the same order on every machine, and on a busy one more threads take several times as long.
    with threadpool_limits(1):
        return tsne.fit_transform(embeddings.astype(np.float32))


def _swatch(person: int) -> str:
    """The person's marker as on the map."""
    from matplotlib.markers import MarkerStyle

    marker = MarkerStyle(_PEOPLE_MARKERS[person % len(_PEOPLE_MARKERS)])
    polygon = marker.get_path().transformed(marker.get_transform()).to_polygons()[0]
    points = " ".join(f"{x:.2f},{-y:.2f}" for x, y in np.asarray(polygon))
    return f'<svg viewBox="-.6 -.6 1.2 1.2"><polygon points="{points}" fill="{_PEOPLE_COLOURS[person % len(_PEOPLE_COLOURS)]}"/></svg>'


def _map(report: Report) -> str:
    """t-SNE of some people; nothing where there are hardly any points."""
    finite = np.isfinite(report.embeddings).all(1) if len(report.embeddings) else np.zeros(0, bool)
    embeddings, people = report.embeddings[finite], report.people[finite] if len(finite) else report.people[:0]
    if len(embeddings) < MAP_LEAST:
        return ""
    rows, ranks = _choose_people(people)
    if len(rows) < MAP_LEAST:
        return ""
    embeddings = embeddings[rows]
    if report.verification.distance == "cosine":
        embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    places = _flatten(embeddings)

    def draw(axes: "Axes") -> None:
        for person in np.unique(ranks):
            marker, colour = _PEOPLE_MARKERS[person % len(_PEOPLE_MARKERS)], _PEOPLE_COLOURS[person % len(_PEOPLE_COLOURS)]
            axes.plot(*places[ranks == person].T, linestyle="", marker=marker, markersize=4.5, color=colour, alpha=0.85, markeredgewidth=0)
        axes.set_axis_off()
        axes.set_aspect("equal", adjustable="datalim")

    # The names are HTML: they wrap on a phone, and any script and letter can be shown.
    names = [str(people[rows][ranks == person][0]) for person in np.unique(ranks)]
    legend = "".join(f"<li>{_swatch(person)}{escape(name)}</li>" for person, name in enumerate(names))
    note = f"{len(rows):,} images of the {len(names)} people with most images, by t-SNE: what is near stays near, the scale means nothing."
    return _section("Map of people", f'<div class="map">{_plot("Map of people", draw, height=4.4)}<ul>{legend}</ul></div>', note)


# The page.

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


def _grid(*figures: str) -> str:
    return f'<div class="plots">{"".join(figures)}</div>' if any(figures) else ""


def _page(report: Report) -> str:
    finite = np.isfinite(report.distances)
    measured = replace(report, distances=report.distances[finite], same=report.same[finite].astype(bool))
    sections = (
        _headline(report.verification),
        _section("Verification", _grid(_roc_plot(measured), _histogram_plot(measured))),
        _grid(_folds(report.verification), _origin(report)),
        _mistakes(report.mistakes),
        _section("Training", _grid(*(_curve_plot(report.metrics, *curve) for curve in _CURVES))),
        _map(report),
    )
    body = "\n".join(section for section in sections if section)
    # The policy makes the browser itself refuse scripts and the network.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    title = escape(report.title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
