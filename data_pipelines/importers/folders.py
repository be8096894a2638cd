"""A folder per person, as a directory or inside a zip or tar file."""

import atexit
import bz2
import gzip
import lzma
import re
import shutil
import tarfile
import tempfile
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


def _tar_slice(plain: Path, offset: int, size: int) -> bytes:
    with plain.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _unpacked(path: Path) -> Path:
    """A compressed tar as a plain one in the temporary directory: reading one member of it would unpack all before."""
    plain = tempfile.NamedTemporaryFile(prefix="facenet_jax_", suffix=".tar", delete=False)  # noqa: SIM115 - lives as long as the process
    atexit.register(Path(plain.name).unlink, missing_ok=True)
    with plain:
        for opener in (gzip.open, bz2.open, lzma.open):
            try:
                with opener(path) as packed:
                    shutil.copyfileobj(packed, plain, 1 << 20)
                return Path(plain.name)
            except (gzip.BadGzipFile, OSError, lzma.LZMAError):
                plain.seek(0)
                plain.truncate()
    raise BadInput(f"{path}: neither a tar file nor one compressed by gzip, bzip2 or xz")


def _is_plain(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def tar_file(path: Path) -> list[Photograph]:
    """The same layout in a tar file; a compressed one is unpacked into the temporary directory while it is read."""
    try:
        # Unpacked here, by the process that outlives its workers: they read slices of the same file.
        plain = path if _is_plain(path) else _unpacked(path)
        with tarfile.open(plain, "r:") as archive:
            members = [m for m in archive if m.isfile()]
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: {error}") from None
    readers = [partial(_tar_slice, plain, m.offset_data, m.size) for m in members]
    return _sorted([_photograph(PurePosixPath(m.name), read) for m, read in zip(members, readers, strict=True)], path)
