"""MTCNN's weights from three kinds of files, written here as those projects write them, and damaged."""

import collections
import io
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facenet_jax.detection.networks import variables_shapes
from facenet_jax.errors import BadInput
from facenet_jax.weights import mtcnn

HEADS = {
    "pnet": {"scores": ("conv4-1", "conv4_1"), "boxes": ("conv4-2", "conv4_2")},
    "rnet": {"dense4": ("conv4", "dense4"), "scores": ("conv5-1", "dense5_1"), "boxes": ("conv5-2", "dense5_2")},
    "onet": {
        "dense5": ("conv5", "dense5"),
        "scores": ("conv6-1", "dense6_1"),
        "boxes": ("conv6-2", "dense6_2"),
        "points": ("conv6-3", "dense6_3"),
    },
}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {name: flatten_dict(tree, sep="/") for name, tree in variables_shapes().items()}
    return {name: {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in tree.items()} for name, tree in shapes.items()}


def original(tensors, network):
    """det1.npy: a pickled dictionary; kernels of the transposed image."""
    layers = collections.defaultdict(dict)
    for path, array in tensors.items():
        layer, kind = path.split("/")
        if kind == "slope":
            layers[f"PReLU{layer[-1]}"]["alpha"] = array
        else:
            name = HEADS[network].get(layer, (layer,))[0]
            layers[name][{"kernel": "weights", "bias": "biases"}[kind]] = array.swapaxes(0, 1) if array.ndim == 4 else array
    stream = io.BytesIO()
    np.save(stream, np.array(dict(layers), dtype=object), allow_pickle=True)
    return stream.getvalue()


def torch_state(tensors, network):
    state = {}
    for path, array in tensors.items():
        layer, kind = path.split("/")
        if kind == "slope":
            state[f"prelu{layer[-1]}.weight"] = array
        else:
            name = HEADS[network].get(layer, (layer, layer))[1]
            turned = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array
            state[f"{name}.{'weight' if kind == 'kernel' else 'bias'}"] = turned
    return state


def assert_same(found, params):
    for network, tensors in params.items():
        there = flatten_dict(found.variables["params"][network], sep="/")
        assert there.keys() == tensors.keys()
        for path, array in tensors.items():
            np.testing.assert_array_equal(there[path], array, err_msg=path)


def test_the_originals_files(params, tmp_path):
    for index, (network, tensors) in enumerate(params.items(), 1):
        (tmp_path / f"det{index}.npy").write_bytes(original(tensors, network))
    assert_same(mtcnn.read(tmp_path), params)


@pytest.mark.parametrize("zipped", [True, False])
def test_facenet_pytorchs_files(params, tmp_path, zipped):
    torch = pytest.importorskip("torch")
    for network, tensors in params.items():
        state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in torch_state(tensors, network).items()}
        torch.save(state, tmp_path / f"{network}.pt", _use_new_zipfile_serialization=zipped)
    assert_same(mtcnn.read(tmp_path), params)


def test_both_published_sources_hold_the_same_numbers():
    from importlib.util import find_spec
    from pathlib import Path

    from facenet_jax import models
    from facenet_jax.apps import pretrained
    from facenet_jax.weights.portable import load_weights

    package = find_spec("facenet_pytorch")
    if package is None or package.origin is None:
        pytest.skip("needs facenet-pytorch")
    try:
        published = load_weights(pretrained.fetch("mtcnn"))
    except BadInput as error:
        pytest.skip(str(error))
    other = mtcnn.read(Path(package.origin).parent / "data")
    assert models.parameter_count(published.variables) == 6_632 + 100_178 + 389_040
    assert other.fingerprint == published.fingerprint


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_that_would_execute_is_refused(tmp_path, params):
    evil = np.array({"conv1": {"weights": Bomb()}}, dtype=object)
    stream = io.BytesIO()
    np.save(stream, evil, allow_pickle=True)
    (tmp_path / "det1.npy").write_bytes(stream.getvalue())
    with pytest.raises(BadInput, match=r"det1.npy: it names builtins.exec"):
        mtcnn.read(tmp_path)
    (tmp_path / "det1.npy").unlink()
    with zipfile.ZipFile(tmp_path / "pnet.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(BadInput, match=r"pnet.pt: it names .*exec"):
        mtcnn.read(tmp_path)


def test_missing_files_and_wrong_shapes_are_named(tmp_path, params):
    with pytest.raises(BadInput, match=r"no pnet.lz4, pnet.pt or det1.npy"):
        mtcnn.read(tmp_path)
    for index, (network, tensors) in enumerate(params.items(), 1):
        wrong = {**tensors, "conv2/bias": np.zeros(7, np.float32)} if network == "rnet" else tensors
        (tmp_path / f"det{index}.npy").write_bytes(original(wrong, network))
    with pytest.raises(BadInput, match=r"det2.npy: rnet tensor conv2/bias has shape \(7,\), expected \(48,\)"):
        mtcnn.read(tmp_path)
    less = {path: array for path, array in params["onet"].items() if path != "points/bias"}
    (tmp_path / "det2.npy").write_bytes(original(params["rnet"], "rnet"))
    (tmp_path / "det3.npy").write_bytes(original(less, "onet"))
    with pytest.raises(BadInput, match="points/bias has shape none"):
        mtcnn.read(tmp_path)


@pytest.fixture(scope="module")
def files(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for index, (network, tensors) in enumerate(params.items(), 1):
        (folder / f"det{index}.npy").write_bytes(original(tensors, network))
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 40_000), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_bytes_give_one_line_or_numbers(files, tmp_path_factory, place, byte, cut):
    """Whatever a byte becomes, or wherever the file ends: BadInput, or arrays of the right shapes (a changed number shows nowhere)."""
    folder = tmp_path_factory.mktemp("damaged")
    for path in files.iterdir():
        shutil.copy(path, folder)
    data = bytearray((folder / "det1.npy").read_bytes())
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] = byte
    (folder / "det1.npy").write_bytes(bytes(data))
    try:
        found = mtcnn.read(folder)
    except BadInput as error:
        assert "det1.npy" in str(error) and "\n" not in str(error)
    else:
        assert found.variables["params"]["pnet"]["conv1"]["kernel"].shape == (3, 3, 3, 10)
