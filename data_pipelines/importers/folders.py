"""A folder per person, as a directory or inside a zip or tar file."""

import re
import tarfile
import zipfile
import zlib
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from data_pipelines.importers import Photograph
from facenet_jax.errors import BadInput

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which "9" comes before "10"."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _photograph(path: PurePosixPath, read) -> Photograph | None:
    """None for what is not an image in a person's folder (hidden files, lists, files at the top)."""
    if path.suffix.lower() not in ENDINGS or len(path.parts) < 2 or any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return None
    return Photograph(f"{path.parent.name}/{path.stem}", path.parent.name, read)


def _sorted(found: list[Photograph | None], where: Path) -> list[Photograph]:
    photographs = sorted((p for p in found if p), key=lambda p: (natural(p.identity), natural(p.key)))
    if not photographs:
        raise BadInput(f"{where}: no images in folders (one folder a person: name/picture.jpg)")
    seen: set[str] = set()
    for photograph in photographs:
        if photograph.key in seen:
            raise BadInput(f"{where}: two images are called {photograph.key}: names must differ by more than their ending or parent folder")
        seen.add(photograph.key)
    return photographs


def folder(root: Path) -> list[Photograph]:
    """root/person/picture.jpg, also deeper; symbolic links to directories are not followed."""
    found = [_photograph(PurePosixPath(p.relative_to(root).as_posix()), p.read_bytes) for p in root.rglob("*") if p.is_file()]
    return _sorted(found, root)


@lru_cache(1)
def _zip(path: Path) -> zipfile.ZipFile:
    """Opened once in each process."""
    return zipfile.ZipFile(path)


def _zip_member(path: Path, name: str) -> bytes:
    try:
        return _zip(path).read(name)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"damaged in its zip file ({error})") from None


def zip_file(path: Path) -> list[Photograph]:
    """The same layout in a zip file, read without unpacking."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path}: {error}") from None
    return _sorted(
        [_photograph(PurePosixPath(info.filename), partial(_zip_member, path, info.filename)) for info in archive.infolist()], path
    )


def _tar_slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _tar_member(path: Path, name: str) -> bytes:
    with tarfile.open(path) as archive:
        member = archive.extractfile(name)
        return member.read() if member else b""


def tar_file(path: Path) -> list[Photograph]:
    """The same layout in a tar file; an uncompressed one is read in place."""
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive if m.isfile()]
    except tarfile.TarError as error:
        raise BadInput(f"{path}: {error}") from None
    plain = tarfile.is_tarfile(path) and path.suffix == ".tar"
    readers = [partial(_tar_slice, path, m.offset_data, m.size) if plain else partial(_tar_member, path, m.name) for m in members]
    return _sorted([_photograph(PurePosixPath(m.name), read) for m, read in zip(members, readers, strict=True)], path)
