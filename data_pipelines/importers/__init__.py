"""Photographs as people keep them: each importer yields faces from one layout, in a fixed order."""

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from facenet_jax.errors import BadInput


@dataclass(frozen=True)
class Photograph:
    """key: path without its ending, unique in the collection; identity: the person's name; read: gives the file's bytes."""

    key: str
    identity: str
    read: Callable[[], bytes]


Photographs = Iterator[Photograph]


def some(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def left_out(where: Path, what: str, names: Collection[str]) -> None:
    """Says in one line on stderr what a listing does not take; nothing where there is nothing to say."""
    if names:
        print(" ".join(f"{where}: left out {len(names)} {what}: {some(names)}".split()), file=sys.stderr)


def distinct(photographs: list[Photograph], where: Path) -> list[Photograph]:
    """The same list; BadInput where two keys or two people are one on a file system that ignores case, or a name is not Unicode."""
    keys: dict[str, str] = {}
    people: dict[str, str] = {}
    for photograph in photographs:
        for what, name, seen in (("people", photograph.identity, people), ("images", photograph.key, keys)):
            other = seen.setdefault(name.lower(), name)
            if other != name:
                raise BadInput(f"{where}: two {what} are called {other} and {name}, which differ only in case: rename one")
        try:
            photograph.key.encode()
        except UnicodeEncodeError:
            raise BadInput(f"{where}: the name {photograph.key!a} is not UTF-8: rename it") from None
    return photographs
