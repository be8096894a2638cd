"""Sampling, transforms and the loader: what a batch holds follows from (seed, number) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import images, loader, records, sampling
from data_pipelines.sources import open_source
from data_pipelines.transforms import Transforms, apply
from facenet_jax.errors import BadInput


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    people=st.integers(2, 5),
    per_person=st.integers(2, 6),
    number=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_people_sampler(counts, people, per_person, number, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    eligible = sum(count >= 2 for count in counts)
    if eligible < people:
        with pytest.raises(BadInput, match="have 2 images or more"):
            sampling.PeopleSampler(labels, people, per_person, 2, seed)
        return
    sampler = sampling.PeopleSampler(labels, people, per_person, 2, seed)
    batch = sampler.batch(number)
    assert batch.shape == (people * per_person,)
    by_image = labels[batch].reshape(per_person, people)
    assert (by_image == by_image[0]).all() and len(set(by_image[0])) == people
    for column in batch.reshape(per_person, people).T:
        own = counts[labels[column[0]]]
        assert own >= 2 and len(set(column.tolist())) == min(own, per_person)
    np.testing.assert_array_equal(batch, sampling.PeopleSampler(labels, people, per_person, 2, seed).batch(number))


def test_an_epoch_shows_everyone_once():
    labels = np.repeat(np.arange(12), 3)
    sampler = sampling.PeopleSampler(labels, 4, 2)
    seen = np.concatenate([labels[sampler.batch(i)][:4] for i in range(sampler.batches_per_epoch)])
    assert sorted(seen) == list(range(12))
    shuffled = sampling.ShuffledSampler(labels, 6)
    assert sorted(np.concatenate([shuffled.batch(i) for i in range(6)])) == list(range(36))
    assert not np.array_equal(shuffled.batch(0), shuffled.batch(6))


def test_impossible_batches():
    labels = np.repeat(np.arange(3), 2)
    for make, words in (
        (lambda: sampling.PeopleSampler(labels, 4, 2), "only 3 of 3 people"),
        (lambda: sampling.PeopleSampler(labels, 1, 4), "at least 2"),
        (lambda: sampling.ShuffledSampler(labels, 7), "7 images out of 6"),
    ):
        with pytest.raises(BadInput, match=words):
            make()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records") / "toy"
    rng = np.random.default_rng(0)
    with records.Writer(directory, "toy", {"train": 2}) as writer:
        for person in range(6):
            for i in range(4):
                writer.add("train", images.encode(rng.integers(0, 256, (32, 32, 3), np.uint8)), person, f"p{person}", f"p{person}/{i}")
        writer.finish({"identities": [f"p{i}" for i in range(6)]})
    return open_source(str(directory), "train")


ALL = Transforms(24, crop=28, shift=2, zoom=0.1, flip=True, rotation=10, brightness=0.2, contrast=0.3, grey=0.3, jpeg_quality=40, erase=0.5)


def test_batches_do_not_depend_on_workers_hosts_or_start(source):
    sampler = sampling.PeopleSampler(source.labels, 4, 3)
    whole = list(loader.batches(source, sampler, ALL, 5, stop=6))
    assert whole[0]["image"].shape == (12, 24, 24, 3) and whole[0]["image"].dtype == np.uint8
    with_workers = list(loader.batches(source, sampler, ALL, 5, stop=6, workers=2))
    later = list(loader.batches(source, sampler, ALL, 5, start=3, stop=6))
    halves = [list(loader.batches(source, sampler, ALL, 5, stop=6, host=h, hosts=2)) for h in (0, 1)]
    for number, batch in enumerate(whole):
        for name in batch:
            np.testing.assert_array_equal(batch[name], with_workers[number][name])
            np.testing.assert_array_equal(batch[name], np.concatenate([half[number][name] for half in halves]))
            if number >= 3:
                np.testing.assert_array_equal(batch[name], later[number - 3][name])
    other = next(loader.batches(source, sampler, ALL, 6, stop=1))
    assert not np.array_equal(other["image"], whole[0]["image"])
    with pytest.raises(BadInput, match="5 hosts"):
        loader.batches(source, sampler, ALL, 5, stop=1, hosts=5)


def test_a_damaged_picture_is_named(source):
    class Broken:
        labels, keys, identities, metadata = source.labels, source.keys, source.identities, {}

        def image(self, index):
            return source.image(index)[:100]

    with pytest.raises(BadInput, match=f"record {source.keys[3]}"):
        loader.load_pixels(Broken(), 3)


def test_without_chance_is_the_middle_resized():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    np.testing.assert_array_equal(apply(pixels, Transforms(20, crop=20), np.random.default_rng(0)), pixels[5:25, 5:25])
    assert ALL.without_chance() == Transforms(24, crop=28)
    with pytest.raises(BadInput, match=r"crop=40.*30x30"):
        apply(pixels, Transforms(20, crop=40), np.random.default_rng(0))


@pytest.mark.parametrize("name", ["shift", "zoom", "flip", "rotation", "brightness", "contrast", "grey", "jpeg_quality", "erase"])
def test_each_transform_changes_pixels_but_keeps_the_face(name):
    value = {
        "shift": 2,
        "zoom": 0.1,
        "flip": True,
        "rotation": 10.0,
        "brightness": 0.2,
        "contrast": 0.3,
        "grey": 1.0,
        "jpeg_quality": 20,
        "erase": 1.0,
    }[name]
    ramp = np.linspace(20, 230, 40)
    pixels = np.stack([np.add.outer(ramp, ramp) / 2, np.add.outer(ramp, 0 * ramp), np.add.outer(0 * ramp, ramp)], -1).astype(np.uint8)
    plain = apply(pixels, Transforms(24), np.random.default_rng(0)).astype(float)
    changed = [apply(pixels, Transforms(24, **{name: value}), np.random.default_rng(i)).astype(float) for i in range(8)]
    differences = [np.abs(c - plain).mean() for c in changed]
    assert max(differences) > 0.5
    if name not in ("flip", "grey", "brightness"):
        assert max(differences) < 40
    if name == "flip":
        assert {tuple(c.ravel()) for c in changed} == {tuple(plain.ravel()), tuple(plain[:, ::-1].ravel())}
    if name == "grey":
        assert (changed[0][..., 0] == changed[0][..., 1]).all()


def test_impossible_transforms():
    for arguments in ({"size": 0}, {"size": 8, "rotation": 30}, {"size": 8, "jpeg_quality": 101}, {"size": 8, "erase": 2}):
        with pytest.raises(BadInput, match="transforms"):
            Transforms(**arguments)
    for name, wrong in (
        ("brightness", (-0.1, 1.5)),
        ("contrast", (-0.1, 1.5, float("nan"))),
        ("grey", (-1, 2)),
        ("erase", (-1, 2)),
        ("zoom", (-0.1, 1)),
        ("jpeg_quality", (-1, 101)),
    ):
        for value in wrong:
            with pytest.raises(BadInput, match=rf"transforms\.{name}={value}"):
                Transforms(8, **{name: value})
    Transforms(8, brightness=1.0, contrast=1.0, grey=1.0, erase=1.0, zoom=0.99, jpeg_quality=100)
