"""CelebA: img_align_celeba/000001.jpg, and identity_CelebA.txt with a line `000001.jpg 2880` for each."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from data_pipelines.importers import Photograph, distinct, some
from data_pipelines.importers.folders import ENDINGS, listed, natural, visible
from facenet_jax.errors import BadInput

IMAGES = "img_align_celeba"
IDENTITIES = "identity_CelebA.txt"


def celeba(path: Path) -> list[Photograph]:
    """The images' folder, zip or tar, or a folder that holds it; the list is inside, beside it, or in Anno/ as it is given out.

    Keys are identity/number, as a folder per person would have them. BadInput names images without a line and lines without an image.
    """
    files = {place: read for place, read in listed(path) if read and visible(place)}
    lists = [place for place in files if place.name == IDENTITIES]
    above = path.absolute().parent
    beside = [place / IDENTITIES for place in (above, above / "Anno", above.parent / "Anno")]
    if lists:
        source, text = str(lists[0]), files[lists[0]]()
    elif existing := [p for p in beside if p.is_file()]:
        source, text = str(existing[0]), existing[0].read_bytes()
    else:
        raise BadInput(f"{path}: {IDENTITIES} is neither in it nor beside it; a folder for each person is --layout=folders")
    zips = [place for place in files if place.name == f"{IMAGES}.zip"]
    if path.is_dir() and zips and not any(IMAGES in place.parts for place in files):
        files = {place: read for place, read in listed(path / zips[0]) if read and visible(place)}
    return _joined(_pictures(files, path), _identities(text, source), path)


def _pictures(files: dict[PurePosixPath, Callable[[], bytes]], where: Path) -> dict[str, Callable[[], bytes]]:
    """Readers by file name without its ending: the same photographs are given out as .jpg and as .png."""
    images = [place for place in files if place.suffix.lower() in ENDINGS]
    pictures: dict[str, PurePosixPath] = {}
    for place in [place for place in images if IMAGES in place.parts] or images:
        if other := pictures.get(place.stem):
            raise BadInput(f"{where}: {other} and {place} are the same image of CelebA: keep one")
        pictures[place.stem] = place
    return {stem: files[place] for stem, place in pictures.items()}


def _identities(text: bytes, source: str) -> dict[str, str]:
    """Identity by file name without its ending."""
    identities: dict[str, str] = {}
    for number, line in enumerate(text.decode(errors="replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not (words[1].isascii() and words[1].isdecimal()):
            raise BadInput(f"{source}: line {number} is not a file name and a number, as in '000001.jpg 2880'")
        stem = PurePosixPath(words[0]).stem
        if stem in identities:
            raise BadInput(f"{source}: line {number}: {words[0]} is there twice")
        identities[stem] = words[1]
    return identities


def _joined(pictures: dict[str, Callable[[], bytes]], identities: dict[str, str], where: Path) -> list[Photograph]:
    unknown, absent = pictures.keys() - identities.keys(), identities.keys() - pictures.keys()
    problems = [f"{len(unknown)} images have no line in {IDENTITIES}: {some(unknown)}"] if unknown else []
    if absent:
        problems.append(f"{len(absent)} lines of {IDENTITIES} have no image: {some(absent)}")
    if problems or not pictures:
        raise BadInput(f"{where}: {'; '.join(problems) or 'no images'}")
    found = [Photograph(f"{identities[stem]}/{stem}", identities[stem], read) for stem, read in pictures.items()]
    return distinct(sorted(found, key=lambda p: (natural(p.identity), natural(p.key))), where)
