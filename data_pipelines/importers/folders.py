"""A folder per person, as a directory or inside a zip or tar file; what other importers need to list these."""

import atexit
import bz2
import gzip
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from data_pipelines.importers import Photograph, distinct, left_out
from facenet_jax.errors import BadInput

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

Reader = Callable[[], bytes]
Listed = Iterable[tuple[PurePosixPath, Reader | None]]
"""Paths below a folder or in an archive, each with what reads it; None for a folder."""


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which "9" comes before "10"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def visible(path: PurePosixPath) -> bool:
    """False for hidden files and for what macOS adds to archives."""
    return not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _people(listed: Listed, where: Path) -> list[Photograph]:
    """Images in their people's folders; what else is there is named on stderr."""
    photographs, others, strays = [], [], []
    folders: set[PurePosixPath] = set()
    holding: set[PurePosixPath] = set()
    for path, read in listed:
        if not visible(path):
            continue
        if read is None:
            folders.add(path)
        elif path.suffix.lower() not in ENDINGS:
            others.append(str(path))
            folders.add(path.parent)
        elif len(path.parts) < 2:
            strays.append(str(path))
        else:
            person = path.parent
            photographs.append(Photograph(f"{person.name}/{path.stem}", person.name, read))
            holding.add(person)
    if not photographs:
        raise BadInput(f"{where}: no images in folders (one folder a person: name/picture.jpg)")
    holding |= {above for path in holding for above in path.parents}
    left_out(where, "folders without an image", [str(path) for path in folders - holding])
    left_out(where, "images outside of a person's folder", strays)
    left_out(where, "files whose ending is not an image's", others)
    photographs.sort(key=lambda p: (natural(p.identity), natural(p.key)))
    seen: set[str] = set()
    for photograph in photographs:
        if photograph.key in seen:
            raise BadInput(f"{where}: two images are called {photograph.key}: names must differ by more than their ending or parent folder")
        seen.add(photograph.key)
    return distinct(photographs, where)


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BadInput(f"{directory}: cannot be listed ({error.strerror}): change its permissions or move it elsewhere") from None


def _walk(root: Path) -> Listed:
    """Everything below root that is not hidden.

    A link to a folder is followed after all that needs no link, and not where it leads to a folder that is listed already or holds the
    root: no loop is walked twice, no photograph taken twice. Links that lead nowhere are listed as files: reading them tells why.
    """
    seen = {_inode(parent) for parent in root.resolve().parents}
    again: list[str] = []
    odd: list[str] = []
    starts = [root]
    for start in starts:
        directories = [start]
        for directory in directories:
            if _inode(directory) in seen:
                again.append(directory.relative_to(root).as_posix())
                continue
            seen.add(_inode(directory))
            for entry in _entries(directory):
                path = directory / entry.name
                place = PurePosixPath(path.relative_to(root).as_posix())
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    directories.append(path)
                    yield place, None
                elif os.path.isdir(path):
                    starts.append(path)
                elif entry.is_file(follow_symlinks=False) or os.path.isfile(path) or not os.path.exists(path):
                    yield place, path.read_bytes
                else:
                    odd.append(str(place))
    left_out(root, "links to folders that are listed already", again)
    left_out(root, "things that are no files", odd)


@lru_cache(1)
def _zip(path: Path) -> zipfile.ZipFile:
    """Opened once in each process."""
    return zipfile.ZipFile(path)


def _zip_member(path: Path, name: str) -> bytes:
    try:
        return _zip(path).read(name)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, ValueError) as error:
        raise BadInput(f"damaged in its zip file ({error})") from None
    except RuntimeError as error:  # also a method of compression that Python does not have
        raise BadInput(f"cannot be read from its zip file ({error})") from None


def _zip_members(path: Path) -> Listed:
    try:
        infos = zipfile.ZipFile(path).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from None
    return [(PurePosixPath(i.filename), None if i.filename.endswith("/") else partial(_zip_member, path, i.filename)) for i in infos]


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


def _no_file(target: str) -> bytes:
    raise BadInput(f"a link to {target}, which is no file of its tar file" if target else "no file, but a pipe or device")


def _tar_members(path: Path) -> Listed:
    """Members of a plain or compressed tar; a compressed one is unpacked into the temporary directory while it is read."""
    try:
        # Unpacked here, by the process that outlives its workers: they read slices of the same file.
        plain = path if _is_plain(path) else _unpacked(path)
        with tarfile.open(plain, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: {error}") from None
    files = {posixpath.normpath(m.name): m for m in members if m.isfile()}
    for member in members:
        # A link of the archive to another of its files is that file's bytes; tar writes hard links from the archive's root.
        start = "" if member.islnk() else posixpath.dirname(member.name)
        file = files.get(posixpath.normpath(posixpath.join(start, member.linkname))) if member.islnk() or member.issym() else member
        if file is not None and file.isfile():
            yield PurePosixPath(member.name), partial(_tar_slice, plain, file.offset_data, file.size)
        else:
            yield PurePosixPath(member.name), None if member.isdir() else partial(_no_file, member.linkname)


def listed(path: Path) -> Listed:
    """What a directory, zip or tar holds; BadInput for other files."""
    if path.is_dir():
        return _walk(path)
    if path.name.lower().endswith(".zip"):
        return _zip_members(path)
    if path.name.lower().endswith(TAR_ENDINGS):
        return _tar_members(path)
    raise BadInput(f"{path}: not a folder, zip or tar")


def folders(path: Path) -> list[Photograph]:
    """person/picture.jpg, also deeper, in a directory, a zip (read without unpacking) or a tar, also compressed; by person and name."""
    return _people(listed(path), path)
