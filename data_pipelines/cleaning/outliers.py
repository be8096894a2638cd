"""Images far from their person's centre, as davidsandberg/facenet filters them."""

import numpy as np

from data_pipelines.cleaning import distances
from data_pipelines.cleaning.exclusions import Exclusions
from data_pipelines.cleaning.faces import Faces, Finding, Findings, Section, shown


def outliers(faces: Faces, threshold: float, percentile: float = 0, minimum_images: int = 0) -> Findings:
    """Images further than the threshold from their person's centre; then people with fewer images left than the minimum.

    The metric of davidsandberg/facenet (calculate_filtering_metrics.py, which stores its root): the centre is the plain mean of all of the
    person's embeddings. A percentile takes the threshold from the distances themselves.
    """
    labels = faces.source.labels
    distance = distances.between(faces.embeddings, np.arange(len(labels)), faces.centres, labels)
    if percentile:
        threshold = float(np.percentile(distance, percentile))
    out = distance > threshold
    images = {faces.key(row): f"distance {distance[row]:.3f} to the centre" for row in np.flatnonzero(out)}
    left = [rows[~out[rows]] for rows in faces.rows]
    small = [label for label, rows in enumerate(left) if len(rows) < minimum_images]
    people = {faces.person(label): f"{len(left[label])} images left" for label in small}
    found = [
        Finding(
            float(distance[row]),
            {"image": faces.key(row), "identity": faces.person_of(row)},
            f"{faces.key(row)}, beside the most typical of {len(faces.rows[labels[row]])} images",
            shown(faces, [row], faces.typical(left[labels[row]] if len(left[labels[row]]) else faces.rows[labels[row]])),
        )
        for row in np.flatnonzero(out)[np.argsort(-distance[out], kind="stable")]
    ]
    several = np.asarray([len(rows) > 1 for rows in faces.rows])[labels]
    numbers = {
        "images": len(labels),
        "people": len(faces.rows),
        "outliers": len(images),
        "people_excluded": len(people),
        "threshold": threshold,
    }
    note = "Furthest from their person's centre first: another person, a bad crop, or a rare pose."
    return Findings(
        numbers,
        [Section("outliers", "Outliers", note, found)],
        [("Distance to the centre, of people with several images", distance[several], threshold)],
        Exclusions(images, people),
    )
