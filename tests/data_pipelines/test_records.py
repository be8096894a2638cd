"""TFRecords: what is written is read, and every kind of damage is named."""

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import example, records, sources
from data_pipelines.sources import TfRecords, open_source
from facenet_jax.errors import BadInput
from facenet_jax.wire import masked_crc32c


def write(directory, count=10, shards=3):
    with records.Writer(directory, "toy", {"train": shards}) as writer:
        for i in range(count):
            writer.add("train", bytes([i]) * (i + 1), i % 4, f"person{i % 4}", f"person{i % 4}/{i}")
        return writer.finish({"identities": [f"person{i}" for i in range(4)]})


def test_round_trip_and_metadata(tmp_path):
    metadata = write(tmp_path / "toy")
    source = TfRecords(tmp_path / "toy", "train")
    assert metadata["splits"]["train"] == {"images": 10, "people": 4, "shards": 3}
    found = {str(key): (source.image(i), str(source.identities[source.labels[i]])) for i, key in enumerate(source.keys)}
    assert found == {f"person{i % 4}/{i}": (bytes([i]) * (i + 1), f"person{i % 4}") for i in range(10)}
    assert [r["key"] for r in records.iterate(tmp_path / "toy", "train")] == source.keys.tolist()
    assert write(tmp_path / "again")["content_sha256"] == metadata["content_sha256"]


def test_known_frame():
    # Bytes that TensorFlow's TFRecordWriter wrote for b"abc".
    assert records.frame(b"abc") == struct.pack("<Q", 3) + records.frame(b"abc")[8:12] + b"abc" + records.frame(b"abc")[15:]
    assert masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


@settings(max_examples=40, deadline=None)
@given(image=st.binary(max_size=200), label=st.integers(-(2**63), 2**63 - 1), identity=st.text(), key=st.text())
def test_example_round_trip(image, label, identity, key):
    data = example.serialise(image, label, identity, key)
    assert example.parse(data) == {"image": image, "label": label, "identity": identity, "key": key}
    assert records.unframe(records.frame(data), "here") == data


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(position, bit):
    framed = bytearray(records.frame(b"some face" * 5))
    framed[position % len(framed)] ^= 1 << bit
    with pytest.raises(BadInput, match="shard 1: record 2 is damaged"):
        records.unframe(bytes(framed), "shard 1: record 2")


def test_damage_is_named(tmp_path):
    directory = tmp_path / "toy"
    write(directory, shards=1)
    shard = records.shard_paths(directory, "train")[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(BadInput, match="does not match its shard"):
        TfRecords(directory, "train")
    with pytest.raises(BadInput, match="record 9 is cut off"):
        records.write_index(shard)
    shard.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    with pytest.raises(BadInput, match="record 0 is damaged"):
        source = TfRecords(directory, "train")
        [source.image(i) for i in range(10)]
    shard.write_bytes(whole)
    index = records.index_path(shard).read_bytes()
    for damaged in (b"", b"nothing", index[:-30], index[:200] + bytes([index[200] ^ 1]) + index[201:]):
        records.index_path(shard).write_bytes(damaged)
        with pytest.raises(BadInput, match="--reindex"):
            TfRecords(directory, "train")
    records.write_index(shard)
    assert len(TfRecords(directory, "train").labels) == 10


def test_missing_things_are_named(tmp_path):
    with pytest.raises(BadInput, match="no such directory"):
        open_source(str(tmp_path / "none"), "train")
    write(tmp_path / "toy")
    with pytest.raises(BadInput, match="it has the splits train"):
        open_source(str(tmp_path / "toy"), "test")
    records.shard_paths(tmp_path / "toy", "train")[1].unlink()
    with pytest.raises(BadInput, match="2 of the 3 shards"):
        open_source(str(tmp_path / "toy"), "train")
    (tmp_path / "toy" / "metadata.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        open_source(str(tmp_path / "toy"), "train")


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), records.Writer(tmp_path / "toy", "toy", {"train": 1}) as writer:
        writer.add("train", b"x", 0, "a", "a/1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "toy")
    before = sorted(p.name for p in (tmp_path / "toy").iterdir())
    with pytest.raises(BadInput, match="already there"):
        write(tmp_path / "toy")
    assert sorted(p.name for p in (tmp_path / "toy").iterdir()) == before


def test_more_shards_than_files_may_be_open(tmp_path):
    resource = pytest.importorskip("resource", reason="no limits of files here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (tmp_path / "probe").open("w") as probe:
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno() + 20, hard))
    try:
        with pytest.raises(BadInput, match=r"300 shards .* --images_per_shard"):
            write(tmp_path / "out" / "toy", shards=300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_writer_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(records, "ShardWriter", refuse)
    with pytest.raises(PermissionError):
        write(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_directory_do_not_meet(tmp_path):
    with pytest.raises(OSError), records.Writer(tmp_path / "toy", "toy", {"train": 1}) as late:
        late.add("train", b"late", 0, "a", "a/1")
        metadata = write(tmp_path / "toy")
        late.finish({"identities": ["a"]})
    assert [p.name for p in tmp_path.iterdir()] == ["toy"] and records.read_metadata(tmp_path / "toy") == metadata
    assert len(TfRecords(tmp_path / "toy", "train").labels) == 10


def test_what_a_killed_run_left_is_no_shard(tmp_path):
    write(tmp_path / "toy")
    index = records.index_path(records.shard_paths(tmp_path / "toy", "train")[0])
    index.with_name(f".{index.name}.0123.writing").write_bytes(b"half")
    assert len(TfRecords(tmp_path / "toy", "train").labels) == 10
    assert len(records.shards_in(tmp_path / "toy")) == 3


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_OPEN", 2)
    write(tmp_path / "toy", count=30, shards=7)
    source = TfRecords(tmp_path / "toy", "train")
    numbers = {str(key): int(key.split("/")[1]) for key in source.keys}
    for place in np.random.default_rng(0).integers(0, 30, 200):
        number = numbers[str(source.keys[place])]
        assert source.image(place) == bytes([number]) * (number + 1)
        assert len(source._files) <= 2
    sent = pickle.loads(pickle.dumps(source))
    assert not sent._files and sent.image(3) == source.image(3)


def test_array_records_are_a_source_too(tmp_path):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "toy-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(6):
        writer.write(example.serialise(bytes([i]), i // 2 + 5, f"p{i // 2}", f"p{i // 2}/{i}"))
    writer.close()
    source = open_source(str(tmp_path), "train")
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2] and source.identities.tolist() == ["p0", "p1", "p2"]
    assert [source.image(i) for i in range(6)] == [bytes([i]) for i in range(6)]


@pytest.mark.tensorflow
def test_tfds_reads_what_we_write(tmp_path):
    """In CI's own step, the only one with TensorFlow."""
    pytest.importorskip("tensorflow", reason="pip install -r requirements-tensorflow.txt")
    import tensorflow_datasets as tfds

    from data_pipelines import images

    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    with records.Writer(tmp_path / "toy", "toy", {"train": 2}) as writer:
        for i, picture in enumerate(pixels):
            writer.add("train", images.encode(picture, "png"), i % 2, f"p{i % 2}", f"p{i % 2}/{i}")
        writer.finish({"identities": ["p0", "p1"]})
    found = {
        e["key"].decode(): (e["image"], int(e["label"]))
        for e in tfds.as_numpy(tfds.builder_from_directory(str(tmp_path / "toy")).as_dataset("train"))
    }
    assert len(found) == 5
    for i, picture in enumerate(pixels):
        image, label = found[f"p{i % 2}/{i}"]
        np.testing.assert_array_equal(image, picture)
        assert label == i % 2
    assert json.loads((tmp_path / "toy" / "metadata.json").read_text())["splits"]["train"]["images"] == 5
