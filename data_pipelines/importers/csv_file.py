"""A CSV file with columns `image` (path, from the CSV's folder) and `identity`."""

import csv
from pathlib import Path, PurePosixPath

from data_pipelines.importers import Photograph
from facenet_jax.errors import BadInput


def csv_file(path: Path, image_column: str = "image", identity_column: str = "identity") -> list[Photograph]:
    """One photograph a row; BadInput names a missing column, or the line of an empty cell."""
    photographs = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        for column in (image_column, identity_column):
            if column not in (rows.fieldnames or ()):
                raise BadInput(f"{path}: no column {column!r}; it has {', '.join(rows.fieldnames or ()) or 'none'}")
        for row in rows:
            image, identity = row[image_column], row[identity_column]
            if not image or not identity:
                raise BadInput(f"{path}: line {rows.line_num} has an empty {image_column!r} or {identity_column!r}")
            photographs.append(Photograph(str(PurePosixPath(image).with_suffix("")), identity, (path.parent / image).read_bytes))
    if not photographs:
        raise BadInput(f"{path}: no rows")
    return photographs
