"""The list of what to leave out: `clean` writes it, `prepare` takes it.

A text file (UTF-8). A line is the key of an image, `person/picture`, or a person, `person/`; after a tab the reason, which readers skip.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from facenet_jax.errors import BadInput
from facenet_jax.files import written


@dataclass(frozen=True)
class Exclusions:
    """Reasons by image key, and by person."""

    images: Mapping[str, str] = field(default_factory=dict)
    people: Mapping[str, str] = field(default_factory=dict)

    def excluded(self, key: str, identity: str) -> bool:
        """True for an image that is listed, or whose person is."""
        return key in self.images or identity in self.people

    def unmatched(self, keys: Iterable[str], identities: Iterable[str]) -> list[str]:
        """Lines that name nothing there: a list of another data set shows by them."""
        images, people = set(map(str, keys)), set(map(str, identities))
        return [*(key for key in self.images if key not in images), *(f"{name}/" for name in self.people if name not in people)]


def write_exclusions(path: Path, exclusions: Exclusions) -> None:
    """Writes aside, then renames. BadInput where a name would break a line in two."""
    entries = {**exclusions.images, **{f"{name}/": reason for name, reason in exclusions.people.items()}}
    for name in entries:
        if len(name.splitlines()) != 1 or "\t" in name:
            raise BadInput(f"{name!r}: a name with a tab or a line break has no place in {path.name}: rename it and prepare again")
    with written(path) as aside:
        aside.write_text("".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in entries.items()), encoding="utf-8")


def read_exclusions(*paths: Path) -> Exclusions:
    """What all the files name together; BadInput where one is no text."""
    images: dict[str, str] = {}
    people: dict[str, str] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise BadInput(f"{path}: no such list of exclusions") from None
        except UnicodeDecodeError:
            raise BadInput(f"{path}: not UTF-8 text; a list of exclusions has an image key or 'person/' in each line") from None
        for line in lines:
            name, _, reason = line.partition("\t")
            if name.endswith("/"):
                people[name.removesuffix("/")] = reason
            elif name:
                images[name] = reason
    return Exclusions(images, people)
