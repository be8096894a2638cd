"""Findings as report.json, exclude.txt and report.html: one self-contained page, with pictures."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines import loader
from data_pipelines.cleaning.exclusions import write_exclusions
from data_pipelines.cleaning.faces import Finding, Findings, Section
from facenet_jax import command_line
from facenet_jax.files import written
from facenet_jax.report import elements

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = ".pair .lines { display: grid; gap: .3rem; } .pair .lines img { width: 100%; }"


def write(directory: Path, title: str, findings: Findings, details: dict[str, Any], pictures: int) -> None:
    """Writes the three files, each whole. details: names and values of how it was made; pictures: findings of each kind that the page shows."""
    write_exclusions(directory / "exclude.txt", findings.exclusions)
    command_line.write_json(directory / "report.json", to_json(findings, details))
    html = _page(title, findings, details, pictures)
    with written(directory / "report.html") as aside:
        aside.write_text(html, encoding="utf-8", errors="replace")


def to_json(findings: Findings, details: dict[str, Any]) -> dict[str, Any]:
    """All findings, with and without pictures."""
    sections = {s.name: [{"distance": found.distance, **found.facts} for found in s.findings] for s in findings.sections}
    return {**details, "numbers": findings.numbers, "table": findings.table, **sections, **findings.records}


def _finding(found: Finding) -> str:
    columns = max(len(line) for line in found.pictures)
    cells = []
    for line in found.pictures:
        cells += [f'<img src="{elements.jpeg(loader.load_pixels(source, row), str(source.keys[row]))}" alt="">' for source, row in line]
        cells += ["<span></span>"] * (columns - len(line))
    style = f"grid-template-columns: repeat({columns}, 1fr)"
    caption = escape(found.caption).replace("/", "/<wbr>")
    return f'<figure class="pair"><div class="lines" style="{style}">{"".join(cells)}</div><figcaption><b>{found.distance:.3f}</b> {caption}</figcaption></figure>'


def _section(section: Section, pictures: int) -> str:
    shown = "".join(_finding(found) for found in section.findings[:pictures])
    more = f" The first {pictures} of {len(section.findings):,}; report.json has all." if len(section.findings) > pictures else ""
    return elements.section(section.title, f'<div class="pairs">{shown}</div>' if shown else "", section.note + more)


def _histogram(title: str, distances: np.ndarray, threshold: float) -> str:
    if not len(distances):
        return ""
    edges = np.histogram_bin_edges(distances, bins=int(np.clip(np.sqrt(len(distances)), 5, 80)))

    def draw(axes: "Axes") -> None:
        axes.stairs(np.histogram(distances, edges)[0], edges, fill=True, alpha=0.4, color=elements.FIRST)
        axes.axvline(threshold, color=elements.INK, linestyle=":", linewidth=1, label=f"threshold {threshold:.3g}")
        # What lies past the threshold is rare; only a logarithm shows it.
        axes.set(xlabel="squared distance", ylabel="how many", yscale="log")
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), handlelength=1.2)

    return elements.figure(title, elements.plot(title, draw))


def _numbers(numbers: dict[str, float]) -> str:
    tiles = "".join(
        f'<div class="tile"><h3>{escape(name.replace("_", " "))}</h3><p class="big">{format(value, "," if isinstance(value, int) else ".3g")}</p></div>'
        for name, value in numbers.items()
    )
    return f'<section><div class="tiles">{tiles}</div></section>'


def _table(table: list[tuple[str, ...]]) -> str:
    lines = ["".join(f"<{cell}>{escape(word)}</{cell}>" for word in words) for words, cell in zip(table, ["th", *["td"] * len(table)])]
    return elements.section(
        "How many at which distance", f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if table else ""
    )


def _page(title: str, findings: Findings, details: dict[str, Any], pictures: int) -> str:
    terms = "".join(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>" for name, value in details.items())
    body = "\n".join(
        (
            _numbers(findings.numbers),
            elements.section("Distances", elements.grid(*(_histogram(*histogram) for histogram in findings.histograms))),
            _table(findings.table),
            *(_section(section, pictures) for section in findings.sections),
            elements.section("How to repeat this", f"<dl>{terms}</dl>"),
        )
    )
    return elements.document(title, body, _STYLE)
