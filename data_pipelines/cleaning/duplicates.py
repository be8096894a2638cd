"""Pictures that are there twice: the same file, the same pixels, nearly the same picture."""

import hashlib
from collections.abc import Container

import numpy as np
from tqdm import tqdm

from data_pipelines import loader
from data_pipelines.cleaning import distances
from data_pipelines.cleaning.exclusions import Exclusions
from data_pipelines.cleaning.faces import Faces, Finding, Findings, Section, shown
from data_pipelines.sources import Source


def digests(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """SHA-256 of the bytes and of the decoded pixels of every record: [n] texts both. BadInput names a record that does not decode."""
    of_bytes, of_pixels = [], []
    for row in tqdm(range(len(source.keys)), desc="decode", unit="image", mininterval=2, disable=len(source.keys) < 5000):
        data, pixels = source.image(row), loader.load_pixels(source, row)
        of_bytes.append(hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest())
        of_pixels.append(hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest())
    return np.asarray(of_bytes), np.asarray(of_pixels)


def _strangeness(faces: Faces, row: int, *left_out: Container[int]) -> tuple[float, int]:
    """How far an image is from the mean of its person's others that are not left out; infinite where there are none. The row breaks ties."""
    rows = faces.rows[faces.source.labels[row]].tolist()
    others = [other for other in rows if other != row and not any(other in out for out in left_out)]
    if not others:
        return np.inf, row
    return float(((faces.embeddings[row] - faces.embeddings[others].mean(0, dtype=np.float64)) ** 2).sum()), row


def duplicates(faces: Faces, threshold: float) -> Findings:
    """Images that are there twice: the same bytes, the same pixels, or embeddings closer than the threshold (0 looks for exact ones alone).

    Of each set of twins the image stays that agrees best with the other images of its own person; the first, where none does better.
    """
    of_bytes, of_pixels = digests(faces.source)
    dropped: dict[int, tuple[int, float]] = {}
    groups = np.unique(of_pixels, return_inverse=True)[1]
    for rows in np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1]):
        if len(rows) > 1:
            alike = rows.tolist()
            (_, kept), *others = sorted(_strangeness(faces, row, set(alike)) for row in alike)
            dropped |= {row: (kept, 0.0) for _, row in others}
    left = np.setdiff1d(np.arange(len(groups)), list(dropped))
    first, second, distance = (
        distances.close_pairs(faces.embeddings[left], threshold) if threshold > 0 else (left[:0], left[:0], np.zeros(0))
    )
    first, second = left[first], left[second]
    twins: dict[int, set[int]] = {}
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        twins.setdefault(one, set()).add(other)
        twins.setdefault(other, set()).add(one)
    order = [row for _, row in sorted(_strangeness(faces, row, twins[row], dropped) for row in twins)]
    near = distances.thin(order, zip(first.tolist(), second.tolist(), distance.tolist(), strict=True))

    def kind(row: int, kept: int) -> str:
        if row in near:
            return "near"
        return "bytes" if of_bytes[row] == of_bytes[kept] else "pixels"

    sections = {
        f"{how}_{where}": Section(
            f"{how}_{where}",
            f"{title}, {words}",
            "Left: the one that stays. " + note,
            [],
        )
        for where, words, note in (
            ("within", "of one person", ""),
            ("between", "under two names", "One of the names is wrong, or two folders are one person."),
        )
        for how, title in (("bytes", "The same file"), ("pixels", "The same pixels in other bytes"), ("near", "Nearly the same picture"))
    }
    images = {}
    for row, (kept, apart) in sorted({**dropped, **near}.items(), key=lambda item: (item[1][1], item[0])):
        same = bool(faces.source.labels[row] == faces.source.labels[kept])
        section = sections[f"{kind(row, kept)}_{'within' if same else 'between'}"]
        facts = {"kept": faces.key(kept), "dropped": faces.key(row), "identities": [faces.person_of(kept), faces.person_of(row)]}
        caption = f"{faces.key(kept)} stays, {faces.key(row)} goes"
        section.findings.append(Finding(apart, facts, caption, shown(faces, [kept, row])))
        images[faces.key(row)] = f"{section.title.lower()}: {faces.key(kept)} at distance {apart:.4f}"
    numbers: dict[str, float] = {
        "images": len(groups),
        **{name: len(section.findings) for name, section in sections.items()},
        "threshold": threshold,
    }
    return Findings(numbers, list(sections.values()), [("Distance of near duplicates", distance, threshold)], Exclusions(images))
