"""The TensorFlow 1 importer against the original code's numbers, and against files made to break it."""

import functools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.layers import BatchNorm, l2_normalize
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.weights.graph_def import DTYPES, MESSAGES, read_graph
from facenet_jax.weights.tensor_bundle import read_checkpoint
from facenet_jax.weights.tensorflow import Imported, from_tensorflow, read_tensorflow, to_tensorflow
from facenet_jax.wire import masked_crc32c

GOLDEN = Path(__file__).parents[3] / "../shared/golden"
OFFSET = "/Conv2D_bn_offset"
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Writers of small files, as TensorFlow writes them.


def varint(value: int) -> bytes:
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    data, previous = b"", b""
    for key, value in entries:
        shared = next((i for i, pair in enumerate(zip(previous, key)) if pair[0] != pair[1]), min(len(previous), len(key)))
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return data + bytes(4) + (1).to_bytes(4, "little")


def table(entries: list[tuple[bytes, bytes]], damage: Callable[[bytes], bytes] = lambda data: data, compression: int = 0) -> bytes:
    """Two data blocks, a metaindex, an index; `damage` changes each block before its checksum is taken."""
    file = b""

    def put(data: bytes) -> bytes:
        nonlocal file
        handle = varint(len(file)) + varint(len(data))
        typed = data + bytes([compression])
        file += typed + masked_crc32c(typed).to_bytes(4, "little")
        return handle

    half = len(entries) // 2 + 1
    handles = [(part[-1][0], put(damage(block(part)))) for part in (entries[:half], entries[half:]) if part]
    footer = put(block([])) + put(damage(block(handles)))
    return file + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def bundle(prefix: Path, arrays: dict[str, np.ndarray], header: dict[str, Any] | None = None, change: Any = None, **how: Any) -> Path:
    """Writes a checkpoint of float32 arrays; `change(name, fields)` may edit an entry's fields."""
    data, entries = b"", [(b"", MESSAGES["BundleHeader"](**(header or {"shards": 1})).SerializeToString())]
    for name in sorted(arrays):
        content = arrays[name].astype("<f4").tobytes()
        fields = {"dtype": 1, "shape": shape(arrays[name].shape), "offset": len(data), "size": len(content)}
        fields["crc32c"] = masked_crc32c(content)
        if change:
            change(name, fields)
        entries.append((name.encode(), MESSAGES["BundleEntry"](**fields).SerializeToString()))
        data += content
    prefix.with_name(prefix.name + ".index").write_bytes(table(entries, **how))
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)
    return prefix


def shape(sizes: tuple[int, ...]) -> dict[str, Any]:
    return {"dim": [{"size": size} for size in sizes]}


def graph(constants: dict[str, dict[str, Any]]) -> bytes:
    """A GraphDef of Const nodes with these Tensor fields, and one node of another kind."""
    nodes = [MESSAGES["Node"](name="input", op="Placeholder")]
    nodes += [
        MESSAGES["Node"](name=name, op="Const", attr=[{"key": "dtype"}, {"key": "value", "value": {"tensor": tensor}}])
        for name, tensor in constants.items()
    ]
    return MESSAGES["Graph"](node=[node.SerializeToString() for node in nodes]).SerializeToString()


SMALL = {"model/a": np.arange(6.0).reshape(2, 3), "model/ab": np.array(7.0), "other": np.zeros((0, 4)), "z": np.ones(5)}
SMALL_GRAPH = graph(
    {
        "a": {"dtype": 1, "shape": shape((2,)), "content": np.array([1, 2], "<f4").tobytes()},
        "b": {"dtype": 3, "shape": shape((2, 2)), "int_val": [5]},
        "c": {"dtype": 19, "shape": shape((3,)), "half_val": [15360, 0, 16384]},
    }
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked golden directory: a checkpoint, a frozen graph and what the original code says of 25 faces."""
    archive = GOLDEN / "irv1_tf1.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} is absent")
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / "irv1_tf1"


@pytest.fixture(scope="module")
def prelogits() -> Callable[[Imported, np.ndarray], np.ndarray]:
    @functools.cache
    def compiled(embedding_size: int) -> Any:
        model = models.create("inception_resnet_v1", embedding_size=embedding_size)
        return jax.jit(lambda variables, x: model.apply(variables, x, train=False))

    return lambda imported, x: compiled(imported.embedding_size)(imported.variables, x)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A whole 3-d network by the original names, each tensor filled with its own number, and its 2-person classifier."""
    model = models.create("inception_resnet_v1", embedding_size=3)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 80, 80, 3)), train=False))
    leaves, structure = jax.tree.flatten(tree)
    variables = structure.unflatten([np.full(leaf.shape, i, np.float32) for i, leaf in enumerate(leaves)])
    return to_tensorflow(variables, {"kernel": np.full((3, 2), -1.0), "bias": np.full(2, -2.0)})


@pytest.mark.parametrize("source", ["checkpoint", "graph"])
def test_the_network_says_what_the_original_code_says(original: Path, prelogits: Any, source: str) -> None:
    imported = read_tensorflow(original if source == "checkpoint" else original / "frozen.pb")
    expected = np.load(original / "expected.npz")
    found = prelogits(imported, Preprocessing(160, "fixed")(expected["images"]))
    np.testing.assert_allclose(found, expected["prelogits"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(l2_normalize(found), expected["embeddings"], rtol=0, atol=1e-5)
    assert imported.embedding_size == 128
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in jax.tree.leaves(imported.variables))
    if source == "graph":
        # The graph was frozen up to the embeddings: there is no classifier in it.
        assert imported.logits is None
    else:
        logits = found @ imported.logits["kernel"] + imported.logits["bias"]
        np.testing.assert_allclose(logits, expected["logits"], rtol=1e-3, atol=1e-4)
        assert imported.unused == ()


def test_names_come_back(original: Path) -> None:
    stored = read_checkpoint(original)
    imported = from_tensorflow(stored)
    back = to_tensorflow(imported.variables, imported.logits)
    assert back.keys() == stored.keys() and len(back) == 492
    assert all(np.array_equal(back[name], stored[name]) for name in stored)
    assert models.parameter_count(imported.variables) == 22_779_312


def test_a_folded_norm_becomes_one_that_adds_its_offset(tensors: dict[str, np.ndarray]) -> None:
    folded = {name: array for name, array in tensors.items() if "/BatchNorm/" not in name or "Bottleneck" in name}
    for name, array in tensors.items():
        if name.endswith("/BatchNorm/beta") and "Bottleneck" not in name:
            folded[name.removesuffix("/BatchNorm/beta") + OFFSET] = array
    imported = from_tensorflow(folded)
    ours, straight = imported.variables, from_tensorflow(tensors).variables
    assert jax.tree.all(jax.tree.map(np.array_equal, ours["params"], straight["params"]))
    assert np.array_equal(ours["batch_stats"]["Bottleneck_norm"]["var"], straight["batch_stats"]["Bottleneck_norm"]["var"])
    assert imported.unused == ()

    unit = {kind: ours[kind]["Conv2d_1a_3x3"]["norm"] for kind in ("params", "batch_stats")}
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    norm = BatchNorm(use_scale=False, epsilon=1e-3)
    np.testing.assert_allclose(norm.apply(unit, x, train=False), x + unit["params"]["bias"], rtol=2e-7)


def test_moving_averages_are_taken_only_when_asked_for(tensors: dict[str, np.ndarray]) -> None:
    name = "InceptionResnetV1/Block8/Conv2d_1x1/weights"
    shadow, slot = f"{name}/ExponentialMovingAverage", f"{name}/Adagrad"
    stored = {**tensors, shadow: tensors[name] + 1, slot: tensors[name] + 2, "global_step": np.array(7)}
    plain, averaged = from_tensorflow(stored), from_tensorflow(stored, use_moving_average=True)
    kernel = lambda imported: imported.variables["params"]["Block8"]["Conv2d_1x1"]["kernel"]
    assert np.array_equal(kernel(plain), tensors[name]) and np.array_equal(kernel(averaged), tensors[name] + 1)
    assert plain.unused == (slot, shadow, "global_step") and averaged.unused == (name, slot, "global_step")
    with pytest.raises(BadInput, match="no moving averages"):
        from_tensorflow(tensors, use_moving_average=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("InceptionResnetV1/Bottleneck/weights", None, r"Bottleneck/weights is missing"),
        ("InceptionResnetV1/Bottleneck/weights", np.zeros(3, np.float32), r"Bottleneck/weights has shape \[3\], expected \[1792, 128\]"),
        ("InceptionResnetV1/Conv2d_2b_3x3/weights", np.zeros((3, 3, 64, 32), np.float32), r"\[3, 3, 64, 32\], expected \[3, 3, 32, 64\]"),
        (
            "InceptionResnetV1/Conv2d_2b_3x3/BatchNorm/beta",
            np.full(64, np.nan, np.float32),
            r"beta \[64\] holds values that are not finite",
        ),
        ("InceptionResnetV1/Conv2d_2b_3x3/BatchNorm/beta", np.full(64, 1e60), r"beta \[64\] holds values that are not finite"),
        ("InceptionResnetV1/Conv2d_2b_3x3/BatchNorm/beta", np.zeros(64, np.int32), r"beta \[64\] is int32"),
        ("InceptionResnetV1/Conv2d_2b_3x3/BatchNorm/gamma", np.ones(64, np.float32), r"gamma \[64\] is there, expected none"),
        ("Logits/biases", None, r"Logits/biases is missing, expected shape \[2\]"),
        ("Logits/weights", np.zeros((4, 2), np.float32), r"Logits/weights has shape \[4, 2\], expected \[3, 2\]"),
    ],
)
def test_a_wrong_tensor_is_named(tensors: dict[str, np.ndarray], name: str, value: np.ndarray | None, message: str) -> None:
    stored = {**tensors, name: value}
    if value is None:
        del stored[name]
    with pytest.raises(BadInput, match=message) as caught:
        from_tensorflow(stored)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_another_network_is_named_as_such() -> None:
    with pytest.raises(BadInput, match="no tensor under InceptionResnetV1/; there are 'MobilenetV1'"):
        from_tensorflow({"MobilenetV1/Conv/weights": np.zeros(3)})
    with pytest.raises(BadInput, match="no tensor under InceptionResnetV1"):
        from_tensorflow({})
    with pytest.raises(BadInput, match="is missing"):
        to_tensorflow({"params": {"conv": {"kernel": np.zeros(3)}}})


def test_half_precision_is_widened(tensors: dict[str, np.ndarray]) -> None:
    name = "InceptionResnetV1/Conv2d_1a_3x3/weights"
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        imported = from_tensorflow({**tensors, name: np.full((3, 3, 3, 32), 0.5, dtype)})
        kernel = imported.variables["params"]["Conv2d_1a_3x3"]["conv"]["kernel"]
        assert kernel.dtype == np.float32 and (kernel == 0.5).all()


@pytest.mark.parametrize("number", DTYPES)
def test_constants_of_every_type(tmp_path: Path, number: int) -> None:
    dtype, field = DTYPES[number]
    values = np.array([[1, 0], [1, 1]]).astype(dtype)
    listed = values.view(np.uint16) if field == "half_val" else values
    one = listed[0, :1].tolist()
    path = tmp_path / "graph.pb"
    path.write_bytes(
        graph(
            {
                "content": {"dtype": number, "shape": shape((2, 2)), "content": values.tobytes()},
                "listed": {"dtype": number, "shape": shape((2, 2)), field: listed.ravel().tolist()},
                "one": {"dtype": number, "shape": shape((2, 3)), field: one},
                "none": {"dtype": number, "shape": shape((2,))},
                "scalar": {"dtype": number, field: one},
                "empty": {"dtype": number, "shape": shape((0, 3))},
                "string": {"dtype": 7, "shape": shape((2,))},
            }
        )
    )
    found = read_graph(path)
    expected = {
        "content": values,
        "listed": values,
        "one": np.ones((2, 3)),
        "none": np.zeros(2),
        "scalar": np.ones(()),
        "empty": np.zeros((0, 3)),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape and (found[name] == value.astype(dtype)).all(), name


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"shape": shape((3,)), "content": b"1234"}, "4 bytes for"),
        ({"shape": shape((3,)), "float_val": [1, 2]}, "2 values for"),
        ({"shape": shape((1 << 25,)), "float_val": [1]}, "1 values for"),
        ({"shape": shape((1 << 40,)), "float_val": [1]}, "impossible shape"),
        ({"shape": shape((0, 1 << 62, 1 << 62))}, "impossible shape"),
        ({"shape": shape((-1,))}, "impossible shape"),
        ({"shape": shape((1,) * 33), "float_val": [1]}, "rank"),
        ({"shape": {"unknown_rank": True}, "float_val": [1]}, "rank"),
    ],
)
def test_a_constant_that_lies_is_refused(tmp_path: Path, tensor: dict[str, Any], message: str) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(graph({"a\nb": {"dtype": 1, **tensor}}))
    with pytest.raises(BadInput, match=message) as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)


def test_every_way_to_name_a_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10):
        bundle(tmp_path / f"model-x.ckpt-{step}", {"step": np.array(float(step))})
    prefix = tmp_path / "model-x.ckpt-9"
    step = lambda path: int(read_checkpoint(path)["step"])
    assert [step(f"{prefix}{end}") for end in ("", ".index", ".meta", ".data-00000-of-00001")] == [9] * 4
    assert step(tmp_path / "model-x.meta") == step(tmp_path) == 10
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/home/someone/models/model-x.ckpt-9"\nall_model_checkpoint_paths: "b"\n')
    assert step(tmp_path) == 9
    (tmp_path / "checkpoint").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="names no checkpoint"):
        read_checkpoint(tmp_path)
    for absent in ("model-x.ckpt-8", "nothing.pb"):
        with pytest.raises(BadInput, match="no such"):
            read_tensorflow(tmp_path / absent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no `checkpoint` file"):
        read_tensorflow(tmp_path / "empty")


def test_a_small_checkpoint_is_read_back(tmp_path: Path) -> None:
    found = read_checkpoint(bundle(tmp_path / "m", SMALL))
    assert found.keys() == SMALL.keys()
    assert all(np.array_equal(found[name], SMALL[name]) and found[name].dtype == np.float32 for name in SMALL)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"compression": 1}, "compressed by snappy"),
        ({"header": {"shards": 1, "endianness": 1}}, "big-endian"),
        ({"header": {"shards": 2}}, r"data-00000-of-00002: missing"),
        ({"header": {"shards": -1}}, "data file 0"),
        ({"change": lambda name, fields: fields.update(slices=[b""])}, "partitioned"),
        ({"change": lambda name, fields: fields.update(crc32c=1)}, "checksum"),
        ({"change": lambda name, fields: fields.update(offset=1 << 62)}, "truncated"),
        ({"change": lambda name, fields: fields.update(offset=0, size=24, shape=shape((6,)))}, "checksum|truncated"),
        ({"change": lambda name, fields: fields.update(shape=shape((1 << 30,)), size=1 << 32)}, "truncated"),
        ({"change": lambda name, fields: fields.update(size=1 << 40)}, "1099511627776 bytes at"),
        ({"damage": lambda data: data[:-4] + b"\xff" * 4}, "restarts"),
        ({"damage": lambda data: b"\0" + varint(1 << 40) + data}, "beyond its block"),
    ],
)
def test_a_checkpoint_that_lies_is_refused(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read_checkpoint(bundle(tmp_path / "m", SMALL, **how))
    assert "\n" not in str(caught.value)


def test_one_block_cannot_be_listed_again_and_again(tmp_path: Path) -> None:
    handle = varint(0) + varint(len(block([(b"", b"")])))
    file = table([(b"", b"")])
    index = block([(bytes([i]), handle) for i in range(100)])
    at = len(file) - 48
    typed = index + b"\0"
    file = file[:at] + typed + masked_crc32c(typed).to_bytes(4, "little")
    footer = (varint(0) + varint(0) + varint(at) + varint(len(index))).ljust(40, b"\0")
    (tmp_path / "m.index").write_bytes(file + footer + bytes.fromhex("57fb808b247547db"))
    with pytest.raises(BadInput, match="names out of order"):
        read_checkpoint(tmp_path / "m")


def only_bad_input(read: Callable[[Path], Any], path: Path) -> None:
    try:
        read(path)
    except BadInput as error:
        assert len(str(error).splitlines()) == 1


def flipped(data: bytes, bits: list[int]) -> bytes:
    changed = bytearray(data)
    for bit in bits:
        bit %= 8 * max(len(changed), 1)
        if changed:
            changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


BITS = st.lists(st.integers(0, 1 << 16), min_size=1, max_size=4)


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes(tmp_path: Path, data: bytes, magic: bool) -> None:
    bundle(tmp_path / "m", SMALL)
    (tmp_path / "m.index").write_bytes(data + (bytes.fromhex("57fb808b247547db") if magic else b""))
    (tmp_path / "m.pb").write_bytes(data)
    for read, name in ((read_checkpoint, "m"), (read_graph, "m.pb"), (read_tensorflow, "m"), (read_tensorflow, "m.pb")):
        only_bad_input(read, tmp_path / name)


@FUZZ
@given(BITS, st.integers(0, 1 << 16))
def test_bit_flips_and_truncations(tmp_path: Path, bits: list[int], length: int) -> None:
    index = (bundle(tmp_path / "m", SMALL).parent / "m.index").read_bytes()
    for name, data, read in (("m.index", index, read_checkpoint), ("m.pb", SMALL_GRAPH, read_graph)):
        for changed in (flipped(data, bits), data[: length % len(data)]):
            (tmp_path / name).write_bytes(changed)
            only_bad_input(read, tmp_path / name)
    only_bad_input(read_tensorflow, tmp_path / "m.pb")


@FUZZ
@given(BITS)
def test_bit_flips_under_a_right_checksum(tmp_path: Path, bits: list[int]) -> None:
    only_bad_input(read_checkpoint, bundle(tmp_path / "m", SMALL, damage=lambda data: flipped(data, bits)))


@FUZZ
@given(BITS, st.integers(0, 100))
def test_damaged_data_is_noticed(tmp_path: Path, bits: list[int], length: int) -> None:
    data = (bundle(tmp_path / "m", SMALL).parent / "m.data-00000-of-00001").read_bytes()
    for changed in (flipped(data, bits[:1]), data[: length % len(data)]):
        (tmp_path / "m.data-00000-of-00001").write_bytes(changed)
        with pytest.raises(BadInput, match=r"checksum|truncated"):
            read_checkpoint(tmp_path / "m")
