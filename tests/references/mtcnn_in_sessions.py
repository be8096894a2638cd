"""MTCNN as the original runs it: one photograph at a time, NumPy and OpenCV between three networks in sessions of TensorFlow 1's kind.

Stands in for davidsandberg/facenet's own code, whose TensorFlow 1.15 has no wheels for today's Pythons, in `experiments.benchmarks.detect --also`.
"""

import importlib
from functools import partial

import numpy as np

from facenet_jax.weights.cache import find_weights
from facenet_jax.weights.portable import load_weights
from tests.references import mtcnn_one_by_one


def create(cores):
    """A detector: uint8 RGB [h, w, 3] -> (boxes [n, 5], points [n, 5, 2])."""
    tf = importlib.import_module("tensorflow").compat.v1
    params = load_weights(find_weights("mtcnn")).variables["params"]

    def prelu(x, slope):
        return tf.nn.relu(x) - slope * tf.nn.relu(-x)

    def conv(x, layer, slope=None):
        y = tf.nn.bias_add(tf.nn.conv2d(x, layer["kernel"], 1, "VALID"), layer["bias"])
        return y if slope is None else prelu(y, slope)

    def dense(x, layer):
        return tf.matmul(x, layer["kernel"]) + layer["bias"]

    def flat(x):
        return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [-1, int(np.prod(x.shape[1:]))])

    def face(logits):
        return tf.nn.softmax(logits)[..., 1]

    def pnet(p, x):
        x = tf.nn.max_pool2d(conv(x, p["conv1"], p["conv1"]["slope"]), 2, 2, "SAME")
        x = conv(conv(x, p["conv2"], p["prelu2"]["slope"]), p["conv3"], p["prelu3"]["slope"])
        return face(conv(x, p["scores"])), conv(x, p["boxes"])

    def rnet(p, x):
        x = tf.nn.max_pool2d(conv(x, p["conv1"], p["prelu1"]["slope"]), 3, 2, "SAME")
        x = tf.nn.max_pool2d(conv(x, p["conv2"], p["prelu2"]["slope"]), 3, 2, "VALID")
        x = prelu(dense(flat(conv(x, p["conv3"], p["prelu3"]["slope"])), p["dense4"]), p["prelu4"]["slope"])
        return face(dense(x, p["scores"])), dense(x, p["boxes"])

    def onet(p, x):
        x = tf.nn.max_pool2d(conv(x, p["conv1"], p["prelu1"]["slope"]), 3, 2, "SAME")
        x = tf.nn.max_pool2d(conv(x, p["conv2"], p["prelu2"]["slope"]), 3, 2, "VALID")
        x = tf.nn.max_pool2d(conv(x, p["conv3"], p["prelu3"]["slope"]), 2, 2, "SAME")
        x = prelu(dense(flat(conv(x, p["conv4"], p["prelu4"]["slope"])), p["dense5"]), p["prelu5"]["slope"])
        return face(dense(x, p["scores"])), dense(x, p["boxes"]), dense(x, p["points"])

    def in_session(network, name, side):
        graph = tf.Graph()
        with graph.as_default():
            x = tf.placeholder(tf.float32, [None, side, side, 3])
            outputs = network({layer: dict(values) for layer, values in params[name].items()}, x)
            session = tf.Session(graph=graph, config=tf.ConfigProto(intra_op_parallelism_threads=cores, inter_op_parallelism_threads=1))
        return lambda images: session.run(outputs, {x: images})

    first, second, third = in_session(pnet, "pnet", None), in_session(rnet, "rnet", 24), in_session(onet, "onet", 48)
    return partial(mtcnn_one_by_one.detect, networks=(lambda image: [found[0] for found in first(image[None])], second, third))
