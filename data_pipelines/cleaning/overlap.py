"""People of a training set who are in an evaluation set too, by name and by face."""

import unicodedata
from typing import Any

import numpy as np

from data_pipelines.cleaning import distances
from data_pipelines.cleaning.exclusions import Exclusions
from data_pipelines.cleaning.faces import Faces, Finding, Findings, Section, closest_images, shown

# Distances at which people are counted.
STEPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)


def plain_name(name: str) -> str:
    """A name without accents, case, punctuation and order of words: "Zellweger, Renée" and "Renee_Zellweger" are one. "" where it has no letter."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).casefold()
    words = "".join(c if c.isalnum() else " " for c in letters).split()
    return " ".join(sorted(words)) if any(c.isalpha() for c in letters) else ""


def _table(closest: np.ndarray, centres: np.ndarray, threshold: float) -> list[tuple[str, ...]]:
    """How many people have which distance [p] below each step."""
    table: list[tuple[str, ...]] = [("Distance below", "Closest images", "Centres", "Either")]
    for step in sorted({*STEPS, threshold}):
        counts = [int((distance < step).sum()) for distance in (closest, centres, np.minimum(closest, centres))]
        table.append((f"{step:g}", *(f"{count:,}" for count in counts)))
    return table


def overlap(faces: Faces, others: Faces, threshold: float) -> Findings:
    """People who are in another set too: by name, by the closest images, by the centres (of unit length), each against all of the other set's people.

    A person goes whose name is there, or whose closest images or centres are closer than the threshold.
    """
    partner, distance = distances.nearest(faces.embeddings, others.embeddings)
    best = np.asarray([rows[distance[rows].argmin()] for rows in faces.rows])
    centres, other_centres = distances.unit(faces.centres), distances.unit(others.centres)
    centre_of, centre_distance = distances.nearest(centres, other_centres)
    by_name = {plain_name(others.person(label)): label for label in reversed(range(len(others.rows)))}
    by_name.pop("", None)
    people: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    same_name: list[Finding] = []
    same_face: list[Finding] = []
    for label, rows in enumerate(faces.rows):
        name, row = faces.person(label), best[label]
        namesake = by_name.get(plain_name(name))
        apart = min(distance[row], centre_distance[label])
        facts = {
            "identity": name,
            "images": len(rows),
            "closest_identity": others.person_of(partner[row]),
            "closest_pair": [faces.key(row), others.key(partner[row])],
            "closest_distance": float(distance[row]),
            "centre_identity": others.person(int(centre_of[label])),
            "centre_distance": float(centre_distance[label]),
            "same_name": "" if namesake is None else others.person(namesake),
            "excluded": bool(apart < threshold or namesake is not None),
        }
        records.append(facts)
        if not facts["excluded"]:
            continue
        nearest = int(others.source.labels[partner[row]]) if apart == distance[row] else int(centre_of[label])
        other = nearest if namesake is None else namesake
        ours, theirs, images_apart = closest_images(faces, label, others, other)
        centres_apart = float(distances.between(centres, np.asarray([label]), other_centres, np.asarray([other]))[0])
        measured = f"closest images at {images_apart:.3f}, centres at {centres_apart:.3f}"
        people[name] = f"{'looks like' if namesake is None else 'same name as'} {others.person(other)}: {measured}"
        caption = f"{name} ({len(rows)} images) and {others.person(other)} ({len(others.rows[other])}); {measured}"
        pictures = (*shown(faces, faces.typical(rows, ours)), *shown(others, others.typical(others.rows[other], theirs)))
        (same_face if namesake is None else same_name).append(Finding(min(images_apart, centres_apart), facts, caption, pictures))
    numbers = {
        "people": len(faces.rows),
        "other_people": len(others.rows),
        "by_name": len(same_name),
        "by_face_alone": len(same_face),
        "people_excluded": len(people),
        "images_excluded": sum(facts["images"] for facts in records if facts["excluded"]),
        "threshold": threshold,
    }
    note = "A line of each set's pictures, first the two that are closest."
    return Findings(
        numbers,
        [
            Section("same_name", "People of the same name", note, sorted(same_name, key=lambda finding: finding.distance)),
            Section("same_face", "People of other names who look alike", note, sorted(same_face, key=lambda finding: finding.distance)),
        ],
        [("Closest images, of each person", distance[best], threshold), ("Closest centre, of each person", centre_distance, threshold)],
        Exclusions({}, people),
        _table(distance[best], centre_distance, threshold),
        {"all_people": records},
    )
