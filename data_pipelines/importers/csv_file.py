"""A CSV file with columns `image` (path, from the CSV's folder) and `identity`."""

import csv
from pathlib import Path, PurePosixPath

from data_pipelines.importers import Photograph, distinct
from facenet_jax.errors import BadInput


def csv_file(path: Path, image_column: str = "image", identity_column: str = "identity") -> list[Photograph]:
    """One photograph a row; BadInput names a missing column, or the line of an empty cell."""
    try:
        return _rows(path, image_column, identity_column)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except csv.Error as error:
        raise BadInput(f"{path}: not a CSV file ({error})") from None


def _rows(path: Path, image_column: str, identity_column: str) -> list[Photograph]:
    photographs: dict[str, Photograph] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        for column in (image_column, identity_column):
            if column not in (rows.fieldnames or ()):
                raise BadInput(f"{path}: no column {column!r}; it has {', '.join(rows.fieldnames or ()) or 'none'}")
        for row in rows:
            image, identity = row[image_column], row[identity_column]
            if not image or not identity:
                raise BadInput(f"{path}: line {rows.line_num} has an empty {image_column!r} or {identity_column!r}")
            if "\0" in image:
                raise BadInput(f"{path}: line {rows.line_num}: a file's name cannot hold a zero byte")
            key = str(PurePosixPath(image).with_suffix(""))
            if key in photographs:
                raise BadInput(f"{path}: line {rows.line_num}: {image} is there twice")
            photographs[key] = Photograph(key, identity, (path.parent / image).read_bytes)
    if not photographs:
        raise BadInput(f"{path}: no rows")
    return distinct(list(photographs.values()), path)
