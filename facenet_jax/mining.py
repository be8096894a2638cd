"""Triplet rules over the global batch.

Squared distances, float32. For every anchor the rule walks over the members of its identity and looks for the negative among all rows: time
O(N^2 K) for N rows of at most K images an identity, memory O(block x N). Nothing here knows of devices: `mine_rows`
answers for some anchors against all rows, and any cut of the anchors into devices or blocks gives the same answer.

Source: FaceNet section 3.2; "violating" is the rule in force in davidsandberg/facenet's train_tripletloss.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from facenet_jax.errors import BadInput

Array = jax.Array
# A Python number: an array here would start JAX's backends on import, before hosts can join.
BIG = 3e38


@dataclass(frozen=True)
class Rule:
    """Which pairs become (anchor, positive), and which negative each pair takes.

    pairs: "all" ordered pairs of an identity, "once" (each unordered pair once, the lower row as anchor),
        "hardest" or "easiest" positive of each anchor.
    inside: the negative must be within the margin, d(a, n) < d(a, p) + margin.
    beyond: the negative must be further than the positive, d(a, n) > d(a, p).
    choose: "nearest" or "random" among those, or "every".
    """

    pairs: str
    inside: bool
    beyond: bool
    choose: str


RULES: dict[str, Rule] = {
    "semi_hard": Rule("all", inside=True, beyond=True, choose="nearest"),
    "semi_hard_random": Rule("all", inside=True, beyond=True, choose="random"),
    "violating": Rule("once", inside=True, beyond=False, choose="random"),
    "every_semi_hard": Rule("all", inside=True, beyond=True, choose="every"),
    "batch_hard": Rule("hardest", inside=False, beyond=False, choose="nearest"),
    "batch_all": Rule("all", inside=True, beyond=False, choose="every"),
    "easy_positive": Rule("easiest", inside=True, beyond=True, choose="nearest"),
}


def rule(name: str) -> Rule:
    """The rule by name; an unknown name is an error that lists the known ones."""
    if name not in RULES:
        raise BadInput(f"no mining rule named {name!r}; there are {', '.join(RULES)}")
    return RULES[name]


class Identities(NamedTuple):
    """Where the members of each row's identity are: `order` [N] sorts rows by label; row r's group is
    order[start[r] : start[r] + size[r]]. Masked rows have size 0 and are in no group. All int32."""

    order: Array
    start: Array
    size: Array
    labels: Array


def identities(labels: Array, mask: Array) -> Identities:
    """Groups rows by label [N] int; rows with mask False take no part (their label is replaced by one of their own)."""
    count = labels.shape[0]
    # Masked rows sort to the end under one label, so that real labels keep their meaning whatever their values.
    order = jnp.lexsort((jnp.arange(count), labels, ~mask))
    ordered = labels[order]
    ordered_mask = mask[order]
    first = jnp.concatenate([jnp.ones(1, bool), (ordered[1:] != ordered[:-1]) | (ordered_mask[1:] != ordered_mask[:-1])])
    group = jnp.cumsum(first) - 1
    starts = jax.ops.segment_min(jnp.arange(count), group, count)
    sizes = jax.ops.segment_sum(ordered_mask.astype(jnp.int32), group, count)
    of_row = jnp.zeros(count, group.dtype).at[order].set(group)
    dense = jnp.where(mask, of_row, -1).astype(jnp.int32)
    return Identities(order.astype(jnp.int32), starts[of_row].astype(jnp.int32), jnp.where(mask, sizes[of_row], 0).astype(jnp.int32), dense)


class Sums(NamedTuple):
    """What adds up over anchors, float32 scalars.

    triplets: pairs that found a negative (for "every": triplets with a positive loss); active: those with a positive loss; possible: how many
    there can be, pairs (for "every": pairs and negatives); positive: sum of
    the pairs' distances; negative: sum over anchors of the mean distance to other identities.
    """

    loss: Array
    triplets: Array
    active: Array
    possible: Array
    pairs: Array
    positive: Array
    anchors: Array
    negative: Array


def hash32(a: Array, b: Array) -> Array:
    """Mixes two uint32 arrays into evenly spread bits: a draw that depends on the triplet, not on who computes it."""
    x = (a * jnp.uint32(0x9E3779B1)) ^ b
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)


def squared_distances(a: Array, b: Array) -> Array:
    """[n, d], [m, d] -> [n, m], float32, never negative."""
    product = jnp.dot(a, b.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a * a, -1)[:, None] + jnp.sum(b * b, -1)[None] - 2 * product, 0)


def _nearest(to_negative: Array, allowed: Array) -> Array:
    """Column of the smallest allowed distance, the lowest at a tie; the number of columns where nothing is allowed."""
    columns = jnp.arange(to_negative.shape[1], dtype=jnp.int32)
    masked = jnp.where(allowed, to_negative, BIG)
    smallest = masked.min(1, keepdims=True)
    return jnp.where((masked == smallest) & allowed, columns, columns.size).min(1)


def _random(allowed: Array, seeds: Array) -> Array:
    """A column drawn evenly from the allowed; the number of columns where nothing is allowed."""
    columns = jnp.arange(allowed.shape[1], dtype=jnp.uint32)
    # The lowest bit marks the allowed, so that the largest draw is one of them wherever there is one.
    bits = jnp.where(allowed, hash32(columns[None], seeds[:, None]) | jnp.uint32(1), jnp.uint32(0))
    largest = bits.max(1, keepdims=True)
    return jnp.where((bits == largest) & allowed, columns.astype(jnp.int32), columns.size).min(1)


def mine_block(
    distances: Array, rows: Array, own: Array, groups: Identities, draw: Array, *, how: Rule, margin: float, max_images: int
) -> tuple[Sums, Array]:
    """Mines for one block of anchors.

    Args:
        distances: [b, N] squared distances of the anchors to all rows.
        rows: [b] int32 their places in the batch.
        own: [b] int32 their dense labels, -1 for anchors that take no part.
        groups: of the whole batch.
        draw: uint32 scalar behind every random choice.
    Returns:
        the sums, and the derivative of the summed loss by each distance, [b, N].
    """
    count = distances.shape[1]
    lanes = jnp.arange(rows.size)
    is_negative = (groups.labels[None] != own[:, None]) & (groups.labels >= 0)[None] & (own >= 0)[:, None]
    to_negative = jnp.where(is_negative, distances, BIG)

    def add_pairs(carry: tuple[Sums, Array], positives: Array, valid: Array) -> tuple[Sums, Array]:
        """One positive for every anchor of the block; rows with valid False have none."""
        sums, gradient = carry
        to_positive = distances[lanes, positives]
        allowed = is_negative & valid[:, None]
        if how.inside:
            allowed &= to_negative < (to_positive + margin)[:, None]
        if how.beyond:
            allowed &= to_negative > to_positive[:, None]
        if how.choose == "every":
            loss = jnp.where(allowed, (to_positive + margin)[:, None] - distances, 0).sum(1)
            found = active = allowed.sum(1, dtype=jnp.float32)
            possible = (is_negative & valid[:, None]).sum(dtype=jnp.float32)
            gradient = gradient - allowed
        else:
            if how.choose == "nearest":
                chosen = _nearest(to_negative, allowed)
            else:
                chosen = _random(allowed, hash32(draw ^ rows.astype(jnp.uint32), positives.astype(jnp.uint32)))
            loss = to_positive + margin - distances[lanes, jnp.minimum(chosen, count - 1)]
            found = (chosen < count).astype(jnp.float32)
            active = found * (loss > 0)
            possible = valid.sum(dtype=jnp.float32)
            loss = loss * active
            gradient = gradient.at[lanes, chosen].add(-active, mode="drop")
        gradient = gradient.at[lanes, positives].add(active)
        return Sums(
            loss=sums.loss + loss.sum(),
            triplets=sums.triplets + found.sum(),
            active=sums.active + active.sum(),
            possible=sums.possible + possible,
            pairs=sums.pairs + valid.sum(),
            positive=sums.positive + (to_positive * valid).sum(),
            anchors=sums.anchors,
            negative=sums.negative,
        ), gradient

    others = is_negative.sum(1, dtype=jnp.float32)
    to_others = jnp.where(is_negative, distances, 0).sum(1) / jnp.maximum(others, 1)
    zero = jnp.float32(0)
    carry = Sums(zero, zero, zero, zero, zero, zero, (others > 0).sum(dtype=jnp.float32), to_others.sum()), jnp.zeros_like(distances)

    if how.pairs in ("hardest", "easiest"):
        columns = jnp.arange(count)
        mates = (groups.labels[None] == own[:, None]) & (own >= 0)[:, None] & (columns[None] != rows[:, None])
        sign = -1.0 if how.pairs == "hardest" else 1.0
        positives = jnp.where(mates, sign * distances, BIG).argmin(1)
        return add_pairs(carry, positives, mates.any(1))

    sizes = jnp.where(own >= 0, groups.size[rows], 0)

    def step(k: Array, carry: tuple[Sums, Array]) -> tuple[Sums, Array]:
        positives = groups.order[jnp.minimum(groups.start[rows] + k, count - 1)]
        valid = (k < sizes) & (positives != rows)
        return add_pairs(carry, positives, valid & (positives > rows) if how.pairs == "once" else valid)

    return lax.fori_loop(0, max_images, step, carry)


def mine_rows(
    own: Array,
    first_row: Array,
    everything: Array,
    labels: Array,
    mask: Array,
    draw: Array,
    *,
    how: Rule,
    margin: float,
    max_images: int,
    block: int,
) -> tuple[Sums, Array, Array]:
    """Anchors `own` [n, d], rows first_row... of the batch, against `everything` [N, d], `block` anchors at a time.

    Returns the sums and the derivative of the *summed* loss by own rows [n, d] and by all rows [N, d].
    """
    n = own.shape[0]
    groups = identities(labels, mask)
    block = min(block, n)
    blocks = -(-n // block)
    anchors = jnp.pad(own, ((0, blocks * block - n), (0, 0))).reshape(blocks, block, -1)

    def step(carry: tuple[Sums, Array], block_of: tuple[Array, Array]) -> tuple[tuple[Sums, Array], Array]:
        total, remote = carry
        index, anchors = block_of
        place = index * block + jnp.arange(block)
        rows = jnp.minimum(first_row + place, everything.shape[0] - 1).astype(jnp.int32)
        # Rows that pad the last block have no identity, so no pairs.
        own_labels = jnp.where(place < n, groups.labels[rows], -1)
        distances = squared_distances(anchors, everything)
        sums, weight = mine_block(distances, rows, own_labels, groups, draw, how=how, margin=margin, max_images=max_images)
        to_anchors = jnp.dot(weight, everything, precision=lax.Precision.HIGHEST)
        to_others = jnp.dot(weight.T, anchors, precision=lax.Precision.HIGHEST)
        remote = remote + 2 * (weight.sum(0)[:, None] * everything - to_others)
        return (jax.tree.map(jnp.add, total, sums), remote), 2 * (weight.sum(1)[:, None] * anchors - to_anchors)

    zero = Sums(*(jnp.float32(0) for _ in Sums._fields))
    (sums, remote), gradients = lax.scan(step, (zero, jnp.zeros_like(everything)), (jnp.arange(blocks), anchors))
    return sums, gradients.reshape(blocks * block, -1)[:n], remote
