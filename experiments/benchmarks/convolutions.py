"""The convolutions of Inception-ResNet-v1, one by one, XLA's beside PyTorch's: `python -m experiments.benchmarks.convolutions --cores=1 [--output=F.json]`.

What `experiments.benchmarks.embed` is made of, to see where the time of a CPU goes. Forward, float32, GFLOP/s; 1x1 kernels run as matrix products in
ours, as in the network. The first case is a matrix product of 1,024 x 1,024, which bounds the others. Needs `pip install -r requirements-benchmarks.txt`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks import timing
from facenet_jax import command_line, compiling, convolution

FLAGS = flags.FLAGS
# (side, channels in, channels out, kernel, stride, padding, how often in the network at 160x160)
SHAPES: tuple[tuple[int, int, int, tuple[int, int], int, str, int], ...] = (
    (160, 3, 32, (3, 3), 2, "VALID", 1),
    (79, 32, 32, (3, 3), 1, "VALID", 1),
    (77, 32, 64, (3, 3), 1, "SAME", 1),
    (38, 80, 192, (3, 3), 1, "VALID", 1),
    (36, 192, 256, (3, 3), 2, "VALID", 1),
    (17, 32, 32, (3, 3), 1, "SAME", 15),
    (17, 96, 256, (1, 1), 1, "SAME", 5),
    (17, 256, 384, (3, 3), 2, "VALID", 1),
    (17, 192, 192, (3, 3), 1, "SAME", 1),
    (8, 128, 128, (1, 7), 1, "SAME", 10),
    (8, 128, 128, (7, 1), 1, "SAME", 10),
    (8, 256, 896, (1, 1), 1, "SAME", 10),
    (8, 256, 256, (3, 3), 1, "SAME", 1),
    (3, 192, 192, (1, 3), 1, "SAME", 6),
    (3, 384, 1792, (1, 1), 1, "SAME", 6),
)


def torch_convolution(x: np.ndarray, kernel: np.ndarray, stride: int, padding: str) -> Any:
    """() -> [n, d, h, w], channels last in memory."""
    import torch

    torch.set_num_threads(timing.cores())
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    pads = tuple(side // 2 for side in kernel.shape[:2]) if padding == "SAME" else (0, 0)

    def run() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.conv2d(images, weight, stride=stride, padding=pads)

    return run


def _run(function: Any, *arguments: jax.Array) -> None:
    function(*arguments).block_until_ready()


def main(_: list[str]) -> None:
    """Command line."""
    timing.use_cores(FLAGS.cores)
    timing.require("torch")
    options = compiling.options()
    random, cases = np.random.default_rng(0), []
    a = jnp.asarray(random.normal(size=(1024, 1024)), jnp.float32)
    seconds = timing.interleaved({"ours": partial(_run, jax.jit(jnp.matmul, compiler_options=options), a, a)}, FLAGS.repeats)["ours"]
    cases.append(timing.rate("matrix product 1024 x 1024", 2 * 1024**3 / 1e9, seconds, None, "", "GFLOP/s", FLAGS.repeats))
    for side, channels, features, window, stride, padding, times in SHAPES:
        x = random.normal(size=(FLAGS.batch, side, side, channels)).astype(np.float32)
        kernel = random.normal(size=(*window, channels, features)).astype(np.float32)
        ours = jax.jit(partial(convolution.conv2d, stride=stride, padding=padding), compiler_options=options)
        on_device, peer = (jnp.asarray(x), jnp.asarray(kernel)), torch_convolution(x, kernel, stride, padding)
        y = np.asarray(ours(*on_device))
        timing.check_equal(f"{side} {channels}->{features}", y, peer().permute(0, 2, 3, 1).numpy(), 1e-5)
        found = timing.interleaved({"ours": partial(_run, ours, *on_device), "peer": peer}, FLAGS.repeats)
        work = 2 * y.size * np.prod(window) * channels / 1e9
        case = f"{side}x{side} {channels}->{features}, {window[0]}x{window[1]} by {stride}, {padding}, {times} times"
        cases.append(timing.rate(case, work, found["ours"], found["peer"], "torch", "GFLOP/s", FLAGS.repeats))
    timing.write(FLAGS.output, "convolutions", cases, ("jax", "jaxlib", "torch", "numpy"))


if __name__ == "__main__":
    flags.DEFINE_integer("batch", 4, "Images; ours embeds by 4 on a CPU.", lower_bound=1)
    timing.define_flags(repeats=21)
    command_line.run(main)
