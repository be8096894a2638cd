"""Layouts by name: `photographs(path, layout)` lists any of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.importers import Photograph, some
from data_pipelines.importers.celeba import IMAGES, celeba
from data_pipelines.importers.csv_file import csv_file
from data_pipelines.importers.folders import TAR_ENDINGS, folders
from data_pipelines.importers.insightface_rec import insightface_rec
from facenet_jax.errors import BadInput


@dataclass(frozen=True)
class Layout:
    """read: lists a path; key: pattern that every key has, "" for any; example: such a file, for the message."""

    read: Callable[[Path], list[Photograph]]
    key: str = ""
    example: str = ""


LAYOUTS = {
    "folders": Layout(folders),
    "csv": Layout(csv_file),
    # These three are folders per person; only their names are known, and checked.
    "casia_webface": Layout(folders, r"\d{7}/\d+", "0000045/001.jpg"),
    "vggface2": Layout(folders, r"n\d{6}/\d{4}_\d{2}", "n000001/0001_01.jpg"),
    "lfw": Layout(folders, r"([^/]+)/\1_\d{4}", "Aaron_Eckhart/Aaron_Eckhart_0001.jpg"),
    "celeba": Layout(celeba),
    "insightface_rec": Layout(insightface_rec),
}


def recognised(path: Path) -> str:
    """The layout that a path's name or content tells."""
    name = path.name.lower()
    if path.is_dir():
        if (path / "train.rec").exists():
            return "insightface_rec"
        # In Img/ as it is given out.
        inside = (folder / given for folder in (path, path / "Img") for given in (IMAGES, f"{IMAGES}.zip"))
        return "celeba" if name == IMAGES or any(map(Path.exists, inside)) else "folders"
    if name == f"{IMAGES}.zip":
        return "celeba"
    if name.endswith((".zip", *TAR_ENDINGS)):
        return "folders"
    for ending, layout in ((".csv", "csv"), (".rec", "insightface_rec")):
        if name.endswith(ending):
            return layout
    raise BadInput(f"{path}: not a folder, zip, tar, csv or rec")


def photographs(path: Path, layout: str = "auto") -> list[Photograph]:
    """Lists the photographs at `path`, in the layout's fixed order.

    BadInput for an unknown name, a path that is not there or not so laid out, and names that the layout does not have.
    """
    if layout not in ("auto", *LAYOUTS):
        raise BadInput(f"no layout {layout!r}; there are auto, {', '.join(LAYOUTS)}")
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    try:
        chosen = LAYOUTS[recognised(path) if layout == "auto" else layout]
        found = chosen.read(path)
    except OSError as error:
        raise BadInput(f"{error.filename or path}: {error.strerror or error}") from None
    if chosen.key and (odd := [p.key for p in found if not re.fullmatch(chosen.key, p.key)]):
        raise BadInput(
            f"{path}: {len(odd)} images are not called as in {layout} ({chosen.example}): {some(odd)}; --layout=folders takes any names"
        )
    return found
