"""One self-contained HTML page about an evaluation: its numbers, its curves, the worst mistakes, a map of people. No script, no network."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from facenet_jax.evaluation.pairs import Verification, roc
from facenet_jax.files import written
from facenet_jax.report import elements

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAP_PEOPLE, MAP_POINTS, MAP_LEAST = 20, 600, 5
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
    with written(path) as aside:
        # Names may come from a file system that is not UTF-8; one odd letter must not cost the report.
        aside.write_text(page, encoding="utf-8", errors="replace")


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
    return elements.section("Folds", f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else "", note)


def _origin(report: Report) -> str:
    terms = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd>" for name, value in report.details.items())
    # A flag is not broken after its hyphens: each word is a box of its own.
    words = " ".join(f"<code>{escape(word)}</code>" for word in report.command.split())
    command = f"<pre>{words}</pre>" if words else ""
    return elements.section("How to repeat this", command + (f"<dl>{terms}</dl>" if terms else ""))


# Pictures of mistakes.


def _mistake(mistake: Mistake) -> str:
    pictures = "".join(f'<img src="{elements.jpeg(picture, mistake.caption)}" alt="">' for picture in (mistake.first, mistake.second))
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
    return elements.section("Worst mistakes", body)


_PEOPLE_COLOURS = ("#4477cc", "#dd7733", "#2f9e62", "#c94f6d", "#8a63c9", "#a0772b", "#2a9fb5", "#d1539f", "#7f8c2f", "#808896")
_PEOPLE_MARKERS = "os^DvPX"


def _roc_plot(report: Report) -> str:
    """TAR over FAR; nothing where one of the two kinds of pairs is missing."""
    found, different = report.verification, int((~report.same).sum())
    if not different or different == len(report.same):
        return ""
    far, tar = roc(report.distances, report.same)
    least = min(1 / different, 0.5)

    def draw(axes: "Axes") -> None:
        # No logarithm of 0: the part of the curve without false accepts lies left of the plot.
        axes.step(np.maximum(far, least / 10), tar, where="post", color=elements.FIRST)
        if least <= found.far_target <= 1:
            axes.axvline(found.far_target, color=elements.INK, linestyle=":", linewidth=1, label=f"FAR target {found.far_target:g}")
        if least <= found.far <= 1:
            axes.errorbar(
                found.far, found.val, found.val_std, fmt="o", markersize=5, capsize=3, color=elements.SECOND, label="VAL ± std of folds"
            )
        axes.set(xscale="log", xlim=(least, 1), ylim=(0, 1.03), xlabel="false accept rate", ylabel="true accept rate")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower right")

    few = f" {different:,} different pairs cannot show a FAR of {found.far_target:g}." if found.far_target < least else ""
    return elements.figure(
        "ROC", elements.plot("ROC curve", draw), f"Share of same pairs accepted over share of different pairs accepted.{few}"
    )


def _histogram_plot(report: Report) -> str:
    """Distances of same and of different pairs."""
    if not len(report.distances):
        return ""
    found = report.verification
    edges = np.histogram_bin_edges(report.distances, bins=int(np.clip(math.sqrt(len(report.distances)), 5, 60)))
    threshold = statistics.median(found.fold_thresholds) if found.fold_thresholds else math.nan

    def draw(axes: "Axes") -> None:
        for name, group, colour in (("same", report.same, elements.FIRST), ("different", ~report.same, elements.SECOND)):
            if group.any():
                heights = np.histogram(report.distances[group], edges)[0] / group.sum()
                axes.stairs(heights, edges, fill=True, alpha=0.35, color=colour)
                axes.stairs(heights, edges, color=colour, linewidth=1.2, label=f"{name} ({group.sum():,})")
        if math.isfinite(threshold):
            axes.axvline(threshold, color=elements.INK, linestyle=":", linewidth=1, label=f"median threshold {threshold:.3g}")
        axes.set(xlabel=f"{found.distance} distance", ylabel="share of pairs")
        axes.set_ylim(bottom=0)
        # Above the plot: inside, it would hide one of the two humps.
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, handlelength=1.2, columnspacing=1.2)

    return elements.figure("Distances", elements.plot("Histogram of distances", draw), "The less the two overlap, the better.")


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
        for (name, points), colour in zip(series.items(), (elements.FIRST, elements.SECOND, elements.THIRD), strict=False):
            # A line through one point is nothing.
            marker = "o" if len(points) <= 30 else ""
            axes.plot(points[:, 0], points[:, 1], color=colour, marker=marker, markersize=3.5, label=name.replace("_", " "))
        from matplotlib.ticker import MaxNLocator

        axes.set(xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if len(series) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, handlelength=1.2)

    return elements.figure(title, elements.plot(f"{title} over steps", draw, height=2.5), caption)


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
    return elements.section(
        "Map of people", f'<div class="map">{elements.plot("Map of people", draw, height=4.4)}<ul>{legend}</ul></div>', note
    )


def _page(report: Report) -> str:
    finite = np.isfinite(report.distances)
    measured = replace(report, distances=report.distances[finite], same=report.same[finite].astype(bool))
    sections = (
        _headline(report.verification),
        elements.section("Verification", elements.grid(_roc_plot(measured), _histogram_plot(measured))),
        elements.grid(_folds(report.verification), _origin(report)),
        _mistakes(report.mistakes),
        elements.section("Training", elements.grid(*(_curve_plot(report.metrics, *curve) for curve in _CURVES))),
        _map(report),
    )
    body = "\n".join(section for section in sections if section)
    return elements.document(report.title, body)
