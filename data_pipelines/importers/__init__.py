"""Photographs as people keep them: each importer yields faces from one layout, in a fixed order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Photograph:
    """key: path without its ending, unique in the collection; identity: the person's name; read: gives the file's bytes."""

    key: str
    identity: str
    read: Callable[[], bytes]


Photographs = Iterator[Photograph]
