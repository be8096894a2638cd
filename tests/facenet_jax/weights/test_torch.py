"""PyTorch weights: facenet-pytorch's network there and back, names, and files made to break the reader."""

import importlib
import importlib.util
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder
from facenet_jax.weights.portable import Weights
from facenet_jax.weights.torch import from_torch, read_state_dict, read_torch, to_torch

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(name, size, **arguments):
    """Variables of a network, each tensor filled with its own number above 0."""
    model = models.create(name, **arguments)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), False))
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([np.full(leaf.shape, i + 1, np.float32) for i, leaf in enumerate(leaves)])


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch", reason="reads what PyTorch writes: requirements-torch.txt")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def facenet(torch):
    """facenet-pytorch's network, random to the last statistic. The package itself imports torchvision; this file of it does not."""
    pytest.importorskip("requests", reason="facenet-pytorch imports it")
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None:
        pytest.skip("needs facenet-pytorch: pip install --no-deps facenet-pytorch")
    from tests.references.torch_networks import fill

    package = types.ModuleType("facenet_pytorch_models")
    package.__path__ = [str(Path(spec.origin).parent / "models")]
    sys.modules[package.__name__] = package
    create = importlib.import_module(f"{package.__name__}.inception_resnet_v1").InceptionResnetV1
    return lambda seed, **arguments: fill(create(**arguments), seed)


@pytest.fixture(scope="module")
def inception():
    """A state dict of a 3-d Inception-ResNet-v1 with a classifier of 2 people, without the counters."""
    variables = filled("inception_resnet_v1", 80, embedding_size=3, bn_scale=True)
    whole = to_torch(variables, "inception_resnet_v1", {"kernel": np.full((3, 2), -1.0), "bias": np.full(2, -2.0)})
    return {name: array for name, array in whole.items() if array.ndim}


@pytest.fixture(scope="module")
def iresnet():
    return to_torch(filled("iresnet18", 16, embedding_size=3), "iresnet18")


def test_facenet_pytorch_there_and_back(torch, facenet, tmp_path):
    network = facenet(0, classify=True, num_classes=7)
    torch.save(torch.nn.DataParallel(network).state_dict(), tmp_path / "w.pt")
    imported = read_torch(tmp_path / "w.pt")
    assert imported.network == "inception_resnet_v1" and imported.size == 160 and imported.unused == ()
    assert models.parameter_count(imported.variables) == 23_482_624
    np.testing.assert_array_equal(imported.logits["kernel"], network.logits.weight.detach().numpy().T)

    images = np.random.default_rng(0).integers(0, 256, (4, 80, 80, 3), np.uint8)
    x = (torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() - 127.5) / 128

    def embeddings(module):
        module.classify = False
        with torch.no_grad():
            return module(x).numpy()

    expected = embeddings(network)
    assert np.linalg.norm(expected[0] - expected[1]) > 0.05
    weights = Weights(imported.variables, imported.network, imported.arguments, {"size": 80, "standardisation": "fixed"}, 512)
    np.testing.assert_allclose(Embedder(weights)(images), expected, rtol=0, atol=1e-4)

    back = {name: torch.from_numpy(array) for name, array in to_torch(imported.variables, imported.network, imported.logits).items()}
    other = facenet(1, classify=True, num_classes=7)
    other.load_state_dict(back, strict=True)
    np.testing.assert_array_equal(embeddings(other), expected)


def test_names_of_facenet_pytorch(facenet, inception):
    """Each tensor has its own number in it: no two are exchanged, whatever their shapes."""
    named = facenet(0, classify=True, num_classes=2).state_dict()
    assert {name for name in named if not name.endswith("num_batches_tracked")} == set(inception)
    variables = from_torch(inception).variables
    kernel = variables["params"]["Mixed_7a"]["Branch_2_Conv2d_0b_3x3"]["conv"]["kernel"]
    assert kernel.flat[0] == inception["mixed_7a.branch2.1.conv.weight"].flat[0]
    again = to_torch(variables, "inception_resnet_v1")
    assert all(np.array_equal(again[name], inception[name]) for name in inception if not name.startswith("logits"))


def test_a_network_without_scales_goes_out_with_ones():
    variables = filled("inception_resnet_v1", 80, embedding_size=3)
    out = to_torch(variables, "inception_resnet_v1")
    weights = [array for name, array in out.items() if name.endswith("bn.weight")]
    assert len(weights) == 112 and all((array == 1).all() for array in weights)
    back = from_torch(out).variables
    np.testing.assert_array_equal(back["params"]["Bottleneck_norm"]["bias"], variables["params"]["Bottleneck_norm"]["bias"])


def test_our_own_names_come_in_too():
    for name, size in (("iresnet18", 32), ("resnet50", 33)):
        variables = filled(name, size, embedding_size=3)
        flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
        imported = from_torch(flat)
        assert imported.network == name and jax.tree.all(jax.tree.map(np.array_equal, imported.variables, variables))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("last_linear.weight", None, r"last_linear\.weight is missing, expected shape \[512, 1792\]"),
        ("last_linear.weight", np.zeros(3, np.float32), r"last_linear\.weight has shape \[3\], expected \[512, 1792\]"),
        ("conv2d_2b.conv.weight", np.zeros((64, 3, 3, 32), np.float32), r"\[64, 3, 3, 32\], expected \[64, 32, 3, 3\]"),
        ("repeat_2.9.branch1.2.bn.bias", np.full(128, np.nan, np.float32), r"bn\.bias \[128\] holds values that are not finite"),
        ("repeat_2.9.branch1.2.bn.bias", np.full(128, 1e60), r"bn\.bias \[128\] holds values that are not finite"),
        ("block8.branch0.bn.running_var", np.full(192, -1, np.float32), r"running_var \[192\] holds a negative variance"),
        ("mixed_6a.branch0.bn.weight", np.zeros(384, np.int32), r"mixed_6a\.branch0\.bn\.weight \[384\] is int32"),
        ("mixed_6a.branch0.bn.weight", None, r"mixed_6a\.branch0\.bn\.weight is missing, expected shape \[384\]"),
        ("repeat_1.5.conv2d.bias", np.ones(256, np.float32), r"'repeat_1\.5\.conv2d\.bias' \[256\] is there, expected none"),
        ("a\nb", np.ones(2, np.float32), r"'a\\nb' \[2\] is there, expected none"),
        ("logits.bias", None, r"logits\.bias is missing, expected shape \[2\]"),
        ("logits.weight", np.zeros((2, 4), np.float32), r"logits\.weight has shape \[2, 4\], expected \[2, 3\]"),
        ("module.logits.bias", np.zeros(2, np.float32), r"'logits\.bias' is there twice"),
    ],
)
def test_a_wrong_tensor_is_named(inception, name, value, message):
    stored = {**inception, name: value}
    if value is None:
        del stored[name]
    with pytest.raises(BadInput, match=message) as caught:
        from_torch(stored)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_wrong_iresnet_is_named(iresnet):
    with pytest.raises(BadInput, match=r"features\.weight \[3\] holds other values than 1, which iresnet18 keeps it at"):
        from_torch({**iresnet, "features.weight": np.full(3, 2, np.float32)})
    with pytest.raises(BadInput, match=r"2, 2, 3, 2 blocks.*iresnet50: 3, 4, 14, 3"):
        from_torch({**iresnet, "layer3.2.bn1.weight": np.ones(256, np.float32)})
    with pytest.raises(BadInput, match=r"layer1\.0\.prelu\.weight is missing"):
        from_torch({name: array for name, array in iresnet.items() if name != "layer1.0.prelu.weight"}, "iresnet18")
    with pytest.raises(BadInput, match=r"not a whole iresnet34: layer1\.2\.\S+ is missing.*more"):
        from_torch(iresnet, "iresnet34")


def test_another_network_is_named_as_such(iresnet):
    with pytest.raises(BadInput, match=r"no known network: 'backbone\.conv'"):
        from_torch({"backbone.conv": np.zeros(3)})
    with pytest.raises(BadInput, match=r"no known network: 'block9_1\.conv'"):
        from_torch({"params/block9_1/conv": np.zeros(3), "params/x": np.zeros(2), "batch_stats/var": np.zeros(1)})
    with pytest.raises(BadInput, match="no known network: none"):
        from_torch({})
    with pytest.raises(BadInput, match=r"for 'nn4_small2'; they are for inception_resnet_v1, resnet50"):
        from_torch(iresnet, "nn4_small2")
    with pytest.raises(BadInput, match="not a whole resnet50"):
        to_torch(from_torch(iresnet).variables, "resnet50")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(iresnet, dtype, tmp_path):
    save_file({name: array.astype(dtype) if array.ndim else array for name, array in iresnet.items()}, tmp_path / "w.safetensors")
    found = read_torch(tmp_path / "w.safetensors").variables["params"]["conv1"]["kernel"]
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, iresnet["conv1.weight"].transpose(2, 3, 1, 0))


def test_files_of_every_kind_hold_the_same(torch, tmp_path):
    """Old and new archives, wrapped in a training checkpoint or not, half precision, tensors that share their storage."""
    whole = torch.arange(6.0).reshape(2, 3)
    stored = {"a": whole, "b": whole[1:, ::2], "c": whole.bfloat16(), "d": torch.tensor(3), "e": torch.nn.Parameter(whole)}
    expected = {"a": whole, "b": [[3, 5]], "c": whole, "d": 3, "e": whole}
    torch.save(stored, tmp_path / "new.pt")
    torch.save(stored, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": stored, "epoch": 3}, tmp_path / "lightning.ckpt")
    torch.save({"model": stored, "args": [1, "x"]}, tmp_path / "model.pt")
    for path in tmp_path.iterdir():
        found = read_state_dict(path)
        assert found.keys() == expected.keys(), path
        assert all(np.array_equal(found[name], expected[name]) for name in expected) and found["c"].dtype == np.float32, path


class Touches:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_is_executed(torch, tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "w.pt"
    path.write_bytes(pickle.dumps(Touches(mark), 2))
    with pytest.raises(BadInput, match=r"not plain PyTorch weights.*nothing in it was run"):
        read_state_dict(path)
    for how in (True, False):
        torch.save({"a": torch.ones(2), "b": Touches(mark)}, path, _use_new_zipfile_serialization=how)
        with pytest.raises(BadInput, match=r"not plain PyTorch weights \(it asks for posix\.system\); nothing in it was run"):
            read_state_dict(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(BadInput, match=r"it asks for torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(path)
    assert not mark.exists()


def test_files_that_are_no_state_dict(torch, tmp_path):
    path = tmp_path / "w.pt"
    for content in (b"", b"<!DOCTYPE html><html><body>404</body></html>", bytes(100), b"PK\x03\x04" + bytes(50)):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="truncated, or another kind of file"):
            read_state_dict(path)
    for value, message in (
        (torch.ones(2), "holds a Tensor, expected a state dict"),
        ({"a": 3}, "'a' is a int, expected a tensor"),
        ({"a": torch.ones(1).expand(1 << 40)}, r"'a' \[1099511627776\] claims more values than the file has"),
        ({"a": torch.ones(2).to_sparse()}, "'a'"),
    ):
        torch.save(value, path)
        with pytest.raises(BadInput, match=message) as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)
    torch.save({"a": torch.zeros(1 << 16)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    with pytest.raises(BadInput, match="more than the file; PyTorch writes no such archive"):
        read_state_dict(tmp_path / "bomb.pt")
    with pytest.raises(BadInput, match="no such file"):
        read_state_dict(tmp_path / "none.pt")


def test_without_pytorch_or_with_an_old_one_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadInput, match=r"pip install -r requirements-torch\.txt"):
        read_state_dict(tmp_path / "w.pt")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.5.1+cpu"))
    with pytest.raises(BadInput, match=r"PyTorch 2\.5\.1\+cpu does not read files safely"):
        read_state_dict(tmp_path / "w.pt")


@pytest.fixture(scope="module")
def small_files(torch, tmp_path_factory):
    """A small state dict in each format: its bytes by suffix, and the tensors."""
    folder = tmp_path_factory.mktemp("small")
    stored = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    torch.save(stored, folder / "zip.pt")
    torch.save(stored, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({name: tensor.numpy() for name, tensor in stored.items()}, folder / "plain.safetensors")
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


@FUZZ
@given(data=st.data())
def test_damaged_files_are_bad_input(small_files, tmp_path, data):
    suffix, whole = data.draw(st.sampled_from(small_files))
    kind = data.draw(st.sampled_from(["noise", "cut", "flip"]))
    if kind == "noise":
        content = data.draw(st.binary(max_size=300))
    elif kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        position = data.draw(st.integers(0, len(whole) - 1))
        content = whole[:position] + bytes([whole[position] ^ 1 << data.draw(st.integers(0, 7))]) + whole[position + 1 :]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    try:
        found = read_state_dict(path)
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        # No format here has a checksum over its numbers.
        assert kind == "flip" and all(isinstance(array, np.ndarray) for array in found.values())
