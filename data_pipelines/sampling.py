"""Which faces make batch number b: functions of (seed, b) alone, so a position is one integer and a resumed run sees the same batches.

Rows are ordered image by image (all people's first image, all people's second, ...): a device's or a BatchNorm group's
run of rows then holds many people, not many images of a few.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from facenet_jax.errors import BadInput


@lru_cache(4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, a permutation of 0..count-1; kept for the batches of this epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


@dataclass(frozen=True, eq=False)
class PeopleSampler:
    """P people x K images. Every person appears once an epoch; the last few that do not fill a batch wait for the next.

    A person with fewer than K images gives all of them, then repeats some (augmented differently); a person with fewer than
    `minimum` is left out.
    """

    labels: np.ndarray
    people: int
    images: int
    minimum: int = 2
    seed: int = 0
    _members: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        if self.people < 2 or self.images < 2:
            raise BadInput(f"batch.people={self.people} x batch.images_per_person={self.images}: both must be at least 2")
        order = np.argsort(self.labels, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(self.labels[order])) + 1)
        enough = [m for m in members if len(m) >= max(self.minimum, 1)]
        if len(enough) < self.people:
            raise BadInput(
                f"batch.people={self.people}, but only {len(enough)} of {len(members)} people have {self.minimum} images or more"
            )
        object.__setattr__(self, "_members", enough)

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.people * self.images

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every person was seen once (but for those left over)."""
        return len(self._members) // self.people

    def batch(self, number: int) -> np.ndarray:
        """Record indices [P * K], row k * P + p."""
        epoch, place = divmod(number, self.batches_per_epoch)
        chosen = epoch_order(self.seed, epoch, len(self._members))[place * self.people : (place + 1) * self.people]
        rng = np.random.default_rng((self.seed, 1, number))
        columns = []
        for person in chosen:
            own = self._members[person]
            rounds = [rng.permutation(own) for _ in range(-(-self.images // len(own)))]
            columns.append(np.concatenate(rounds)[: self.images])
        return np.stack(columns, 1).reshape(-1)


@dataclass(frozen=True, eq=False)
class ShuffledSampler:
    """Every image once an epoch in random order, `rows` at a time; the last few wait for the next epoch."""

    labels: np.ndarray
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows > len(self.labels):
            raise BadInput(f"a batch of {self.rows} images out of {len(self.labels)}")

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every image was seen once (but for those left over)."""
        return len(self.labels) // self.rows

    def batch(self, number: int) -> np.ndarray:
        """Record indices [rows]."""
        epoch, place = divmod(number, self.batches_per_epoch)
        return epoch_order(self.seed, epoch, len(self.labels))[place * self.rows : (place + 1) * self.rows]
