"""People whose images disagree, and two folders that are one person."""

import numpy as np

from data_pipelines.cleaning import distances
from data_pipelines.cleaning.exclusions import Exclusions
from data_pipelines.cleaning.faces import Faces, Finding, Findings, Section, closest_images, shown


def pieces(x: np.ndarray, cut: float) -> list[np.ndarray]:
    """Average linkage: rows of x [k, d] in pieces whose mean distance from each other is above `cut`, largest piece first, then by first row."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    apart = pdist(x.astype(np.float64), "sqeuclidean")
    if not len(apart) or apart.max() <= cut:
        return [np.arange(len(x))]
    piece = fcluster(linkage(apart, "average"), cut, "distance")
    found = [np.flatnonzero(piece == number) for number in np.unique(piece)]
    return sorted(found, key=lambda rows: (-len(rows), rows[0]))


def spread(centre: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Mean squared distance [p] of a person's unit embeddings from each other, from their mean [p, d] and number [p]; 0 for one image."""
    return 2 * images / np.maximum(images - 1, 1) * np.maximum(1 - (centre**2).sum(1), 0) * (images > 1)


def _disagreeing(faces: Faces, cut: float, piece_images: int) -> tuple[list[Finding], dict[str, str], dict[str, str]]:
    """People in several pieces of at least so many images each; what to leave out of images and of people."""
    found: list[Finding] = []
    images: dict[str, str] = {}
    people: dict[str, str] = {}
    for label, rows in enumerate(faces.rows):
        if len(rows) < 2 * piece_images:
            continue
        parts = [rows[part] for part in pieces(faces.embeddings[rows], cut) if len(part) >= piece_images]
        if len(parts) < 2:
            continue
        name, sizes = faces.person(label), [len(part) for part in parts]
        means = distances.centres(faces.embeddings, parts[:2])
        # Mean distance of two groups of unit vectors: 2 - 2 of the product of their means.
        apart = float(2 - 2 * means[0] @ means[1])
        whole = 2 * sizes[0] <= len(rows)
        if whole:
            people[name] = f"pieces of {', '.join(map(str, sizes))} images, none with most of {len(rows)}"
        else:
            images |= {faces.key(row): f"a piece apart of {name}, at distance {apart:.3f}" for part in parts[1:] for row in part}
        facts = {
            "identity": name,
            "images": len(rows),
            "pieces": [[faces.key(row) for row in part] for part in parts],
            "person_excluded": whole,
        }
        caption = f"{name}: {len(rows)} images in pieces of {', '.join(map(str, sizes))}{'; all go' if whole else ''}"
        found.append(Finding(apart, facts, caption, shown(faces, *(faces.typical(part) for part in parts[:2]))))
    return sorted(found, key=lambda finding: -finding.distance), images, people


def identities(faces: Faces, threshold: float, closest: float, cut: float, piece_images: int = 2) -> Findings:
    """People whose images disagree, and people who are one: their centres (of unit length) closer than the threshold, and their closest images than
    `closest`, for centres alone come near where a network hardly tells people apart.

    A person disagrees whose images, joined by average linkage up to `cut`, leave two pieces or more of `piece_images` each. The images outside the
    largest piece go; where no piece has most of the images, the person. Of two people who are one and stay the one with fewer images goes.
    """
    disagreeing, images, people = _disagreeing(faces, cut, piece_images)
    counts = np.asarray([len(rows) for rows in faces.rows])
    centres = distances.unit(faces.centres)
    pairs: list[tuple[int, int, float]] = []
    one = []
    for a, b, apart in sorted(zip(*(side.tolist() for side in distances.close_pairs(centres, threshold))), key=lambda pair: pair[2]):
        first, second, nearness = closest_images(faces, a, faces, b)
        if nearness >= closest:
            continue
        # Whoever goes already takes nobody along.
        if not people.keys() & {faces.person(a), faces.person(b)}:
            pairs.append((a, b, apart))
        facts = {
            "identities": [faces.person(a), faces.person(b)],
            "images": [int(counts[a]), int(counts[b])],
            "mean_distance": float(2 - 2 * faces.centres[a] @ faces.centres[b]),
            "closest_pair": [faces.key(first), faces.key(second)],
            "closest_distance": nearness,
        }
        caption = f"{faces.person(a)} ({counts[a]} images) and {faces.person(b)} ({counts[b]}); closest images {nearness:.3f}"
        pictures = shown(faces, faces.typical(faces.rows[a], first), faces.typical(faces.rows[b], second))
        one.append(Finding(apart, facts, caption, pictures))
    dropped = distances.thin(np.argsort(-counts, kind="stable").tolist(), pairs)
    people |= {faces.person(a): f"one person with {faces.person(b)}, centres at distance {apart:.3f}" for a, (b, apart) in dropped.items()}
    numbers = {
        "people": len(counts),
        "disagreeing": len(disagreeing),
        "one_person_twice": len(one),
        "images_excluded": len(images),
        "people_excluded": len(people),
        "threshold": threshold,
        "closest": closest,
        "cut": cut,
    }
    others = distances.nearest(centres, centres, but_itself=True)[1] if len(counts) > 1 else np.zeros(0)
    return Findings(
        numbers,
        [
            Section(
                "disagreeing", "People whose images disagree", "A line of typical pictures of each of the two largest pieces.", disagreeing
            ),
            Section("one_person_twice", "Two folders, one person", "A line for each folder, first their closest pictures.", one),
        ],
        [
            ("Spread: mean distance of a person's images", spread(faces.centres, counts)[counts > 1], cut),
            ("Distance to the closest other person's centre", others, threshold),
        ],
        Exclusions(images, people),
    )
