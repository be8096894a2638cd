"""One whole training step beside PyTorch's: `python -m experiments.benchmarks.train_step --peer=torch --cores=1 [--output=F.json]`.

The same network from the same weights on the same images: uint8 images on the device, fixed standardisation, forward, every pair of a person with
its nearest semi-hard negative (margin 0.2, squared distances in float32, mean over the triplets), backward, AdaGrad. Loss, gradient norm and
the loss after one update must agree before anything is timed. PyTorch runs channels last, in bfloat16 under autocast, compiled on a GPU (--compile
says otherwise), without TF32 in float32. The network is facenet-pytorch's own (dropout off, BatchNorm with gamma in both).

FLOPs are three times those of the forward pass's convolutions and matrix products (the gradients by images and by kernels cost as much each). Bytes
are XLA's for the compiled step; it counts the body of a loop once (which is why its FLOPs are not used), so on CPU they are a lower bound. Ceilings are measured in the same run. Examples:
  --network=inception_resnet_v1 --batch=32 --cores=1                    one CPU core, the paper's problem in small
  --network=small_resnet --size=64 --batch=120 --cores=1                the network that CPUs train
  --batch=256 --dtype=bfloat16 --repeats=10 --profile=/tmp/profile      a GPU, with a profile for TensorBoard or Perfetto
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import timing
from facenet_jax import command_line, models
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS
MARGIN, LEARNING_RATE = 0.2, 0.01
# Of the loss and the gradient's norm; the second loss also carries what the first update made of the difference.
TOLERANCES = {"float32": (1e-3, 2e-2), "bfloat16": (5e-2, 0.2)}


@dataclass(frozen=True)
class Setup:
    """What both sides train. `steps` are timed together, then waited for: a GPU is handed the next before it ends the last."""

    network: str = "inception_resnet_v1"
    size: int = 160
    batch: int = 32
    images_per_person: int = 4
    dtype: str = "float32"
    steps: int = 1
    compile: str = ""
    variant: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        models.check_size(self.network, self.size)
        if self.images_per_person < 2 or self.batch % self.images_per_person or self.batch < 2 * self.images_per_person:
            raise BadInput(f"a batch of {self.batch} is not made of two or more people with {self.images_per_person} images each")
        if self.dtype not in TOLERANCES:
            raise BadInput(f"--dtype must be float32 or bfloat16, not {self.dtype!r}")

    @property
    def arguments(self) -> dict[str, Any]:
        """For `models.create`: Inception-ResNet-v1 as facenet-pytorch has it, another network as it is unless `variant` says otherwise."""
        return {"embedding_size": 512, "bn_scale": True} if self.network == "inception_resnet_v1" else self.variant

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images [n, s, s, 3] and labels [n]: a picture a person, under noise."""
        rng = np.random.default_rng(0)
        labels = np.tile(np.arange(self.batch // self.images_per_person), self.images_per_person)
        people = rng.integers(0, 256, (labels.max() + 1, self.size, self.size, 3))
        noise = rng.integers(0, 256, (self.batch, self.size, self.size, 3))
        return ((people[labels] + noise) // 2).astype(np.uint8), labels.astype(np.int32)


@dataclass(frozen=True)
class Runner:
    """`once()` makes one step and gives (loss, gradient norm) of it; `run()` makes `steps` of them and waits for the last."""

    once: Callable[[], tuple[float, float]]
    run: Callable[[], None]


@dataclass(frozen=True)
class Ours:
    """Our runner, the weights it started from, and what XLA knows of the compiled step."""

    runner: Runner
    variables: dict[str, Any]
    flops: float
    bytes_accessed: float
    compile_s: float


def arithmetic(jaxpr: Any) -> float:
    """FLOPs of the convolutions and matrix products of a forward jaxpr; padding counts as if it were image, loops times their length."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
        elif name == "cond":
            # A layer's ways of being computed on this platform and that; the plain one is last.
            total += arithmetic(parameters["branches"][-1].jaxpr)
        else:
            inside = sum(arithmetic(getattr(value, "jaxpr", value)) for value in parameters.values() if hasattr(value, "eqns"))
            total += inside * (parameters["length"] if name == "scan" else 1)
    return total


def make_ours(setup: Setup) -> Ours:
    """Our step, compiled for one device, as `experiments.train` runs it."""
    import jax

    from facenet_jax import parallel
    from facenet_jax.losses.triplet import Triplet
    from facenet_jax.preprocessing import Preprocessing
    from facenet_jax.training import optimizers, schedules, step

    mesh = parallel.make_mesh(jax.devices()[:1])
    model = models.create(setup.network, dtype=setup.dtype, **setup.arguments)
    objective = step.Objective(triplet=Triplet("semi_hard", MARGIN, max_images=setup.images_per_person))
    settings, schedule = optimizers.Optimizer("adagrad"), schedules.create("constant", LEARNING_RATE, 1)
    optimizer = optimizers.create(settings, schedule)
    state = jax.device_put(step.initial_state(model, objective, optimizer, settings, setup.size, 0), parallel.replicated(mesh))
    variables = jax.device_get(step.evaluated_variables(state))
    images, labels = setup.data()
    batch = parallel.to_global(mesh, {"image": images, "label": labels})
    train_step: Any = step.make_train_step(model, Preprocessing(setup.size), objective, optimizer, settings, schedule, mesh, 0)

    started = time.perf_counter()
    compiled = train_step.lower(state, batch).compile()
    compile_s = time.perf_counter() - started
    bytes_accessed = float((compiled.cost_analysis() or {}).get("bytes accessed", math.nan))
    forward = jax.make_jaxpr(lambda variables, images: model.apply(variables, images, train=False))(variables, images.astype(np.float32))

    def advance(steps: int) -> Any:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, batch)
        return jax.block_until_ready((state, metrics))[1]

    def once() -> tuple[float, float]:
        metrics = advance(1)
        return float(metrics["loss"]), float(metrics["gradient_norm"])

    return Ours(Runner(once, lambda: advance(setup.steps)), variables, 3 * arithmetic(forward.jaxpr), bytes_accessed, compile_s)


def make_torch(setup: Setup, variables: dict[str, Any]) -> Runner:
    """The same step in PyTorch, from the same weights."""
    import jax
    import torch

    from experiments.benchmarks import torch_networks

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    if jax.default_backend() != device.replace("cuda", "gpu"):
        raise BadInput(f"JAX runs on {jax.default_backend()}, and PyTorch {torch.__version__} cannot: install PyTorch for it, or --peer=")
    # float32 means float32, as it does in ours.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(timing.cores())
    module = torch_networks.build(setup.network, setup.arguments, variables, setup.size).to(device).train()
    optimizer = torch.optim.Adagrad(module.parameters(), LEARNING_RATE, initial_accumulator_value=0.1, foreach=True)
    host_images, labels = setup.data()
    images, owner = torch_networks.as_images(setup.network, host_images).to(device), torch.tensor(labels, device=device)
    same = owner[:, None] == owner[None]
    anchors, positives = (index.to(device) for index in torch.where(same.cpu() & ~torch.eye(setup.batch, dtype=torch.bool)))
    negative = ~same[anchors]

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=setup.dtype == "bfloat16"):
            embeddings = module(torch_networks.standardise(images))
        embeddings = embeddings.float()
        squares = embeddings.square().sum(1)
        distances = (squares[:, None] + squares[None] - 2 * embeddings @ embeddings.T).clamp_min(0)
        to_positive = distances[anchors, positives]
        with torch.no_grad():
            candidates = distances[anchors]
            allowed = negative & (candidates > to_positive[:, None]) & (candidates < to_positive[:, None] + MARGIN)
            nearest, chosen = torch.where(allowed, candidates, math.inf).min(1)
            found = nearest < math.inf
        losses = torch.where(found, to_positive + MARGIN - distances[anchors, chosen], 0.0)
        return losses.sum() / found.sum().clamp_min(1)

    mode = setup.compile or ("default" if device == "cuda" else "none")
    value = loss_of if mode == "none" else torch.compile(loss_of, mode=mode)

    def advance() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = value(images)
        loss.backward()
        optimizer.step()
        return loss

    def once() -> tuple[float, float]:
        loss = advance()
        norms = torch.stack([parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None])
        return float(loss.detach()), float(norms.norm())

    def run() -> None:
        for _ in range(setup.steps):
            advance()
        if device == "cuda":
            torch.cuda.synchronize()

    return Runner(once, run)


def check_equal(setup: Setup, ours: Runner, peer: Runner) -> None:
    """Two steps of each: the same loss and gradient norm, and the same loss after the update."""
    first, second = TOLERANCES[setup.dtype]
    for name, tolerance in (("first step", first), ("second step", second)):
        mine, other = ours.once(), peer.once()
        timing.check_equal(f"loss of the {name} ({mine[0]:.4f}, {other[0]:.4f})", mine[0], other[0], tolerance)
        timing.check_equal(f"gradient norm of the {name} ({mine[1]:.4f}, {other[1]:.4f})", mine[1], other[1], 5 * tolerance)


def ceilings(dtype: str, peer: bool, repeats: int, side: int = 0, megabytes: int = 0) -> tuple[timing.Case, timing.Case]:
    """The device's own limits, (GFLOP/s of a large matrix product, GB/s of a large copy), each by XLA and by PyTorch."""
    import jax
    import jax.numpy as jnp

    from facenet_jax.convolution import precision_for

    gpu = jax.default_backend() != "cpu"
    side, megabytes = side or (8192 if gpu else 2048), megabytes or (2048 if gpu else 256)
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), dtype)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision_for(dtype)))
    # Into a buffer that is there already: fresh memory costs more than the copy.
    negate = jax.jit(lambda into, source: -source, donate_argnums=0, keep_unused=True)
    source = jnp.ones((megabytes << 18,), jnp.float32)
    target = jnp.zeros_like(source)

    def copy() -> None:
        nonlocal target
        target = jax.block_until_ready(negate(target, source))

    products: dict[str, Callable[[], Any]] = {"ours": lambda: jax.block_until_ready(multiply(matrix, matrix))}
    copies: dict[str, Callable[[], Any]] = {"ours": copy}
    if peer:
        import torch

        device = "cuda" if gpu else "cpu"
        wait = torch.cuda.synchronize if gpu else lambda: None
        other = torch.randn(side, side, dtype=getattr(torch, dtype), device=device)
        there, here = (torch.zeros(megabytes << 18, device=device) for _ in range(2))
        products["peer"] = lambda: (torch.mm(other, other), wait())
        copies["peer"] = lambda: (torch.neg(there, out=here), wait())
    product, move = timing.interleaved(products, repeats), timing.interleaved(copies, repeats)
    flops, moved = 2e-9 * side**3, 2e-3 * megabytes * 1.048576
    return (
        timing.rate(f"ceiling: matrix product {side}^3 {dtype}", flops, product["ours"], product.get("peer"), "torch", "GFLOP/s", repeats),
        timing.rate(f"ceiling: copy of {megabytes} MB", moved, move["ours"], move.get("peer"), "torch", "GB/s", repeats),
    )


def measure(setup: Setup, peer: bool, repeats: int, profile: str = "", side: int = 0, megabytes: int = 0) -> list[timing.Case]:
    """All cases: images/s, achieved FLOP/s and bytes/s, the ceilings, our compile time."""
    ours = make_ours(setup)
    functions = {"ours": ours.runner.run}
    if peer:
        other = make_torch(setup, ours.variables)
        check_equal(setup, ours.runner, other)
        functions["peer"] = other.run
    found = timing.interleaved(functions, repeats, warmup=2)
    one, one_peer = (None if key not in found else found[key] / setup.steps for key in ("ours", "peer"))
    assert one is not None
    if profile:
        import jax

        with jax.profiler.trace(profile):
            ours.runner.run()
    product, copy = ceilings(setup.dtype, peer, repeats, side, megabytes)

    name = f"{setup.network} {setup.size}x{setup.size}, batch {setup.batch}, {setup.dtype}, {timing.cores()} cores"
    each = ours.flops / setup.batch / 1e9
    moved = ours.bytes_accessed / setup.batch / 1e6
    fastest = max(product.ours, product.peer or 0)
    widest = max(copy.ours, copy.peer or 0)
    share = ours.flops / 1e9 / one / fastest
    traffic = ours.bytes_accessed / 1e9 / one / widest
    return [
        timing.rate(name, setup.batch, one, one_peer, "torch", "images/s", repeats),
        timing.rate(f"achieved, {each:.2f} GFLOP an image", ours.flops / 1e9, one, one_peer, "torch", "GFLOP/s", repeats),
        timing.rate(f"XLA's bytes, {moved:.1f} MB an image", ours.bytes_accessed / 1e9, one, None, "", "GB/s", repeats),
        product,
        copy,
        timing.Case("share of the matrix product's speed", share, None, "", "1", None, repeats),
        timing.Case("share of the copy's speed", traffic, None, "", "1", None, repeats),
        timing.Case("our first compile", ours.compile_s, None, "", "s", None, 1),
    ]


def main(_: list[str]) -> None:
    """Command line."""
    timing.use_cores(FLAGS.cores)
    # As training does; PyTorch gains from it too, being in the same process.
    command_line.keep_freed_memory()
    # Both libraries must fit on the accelerator: JAX takes what it needs, not three quarters of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if FLAGS.peer not in ("", "torch"):
        raise BadInput(f"no peer named {FLAGS.peer!r}; there is torch")
    if FLAGS.peer:
        timing.require("torch")
    import jax

    size = FLAGS.size or models.network(FLAGS.network).size
    steps = FLAGS.steps or (1 if jax.default_backend() == "cpu" else 10)
    setup = Setup(FLAGS.network, size, FLAGS.batch, FLAGS.images_per_person, FLAGS.dtype, steps, FLAGS.compile)
    cases = measure(setup, bool(FLAGS.peer), FLAGS.repeats, FLAGS.profile)
    timing.write(FLAGS.output, "train_step", cases, ("jax", "jaxlib", "flax", "torch", "facenet-pytorch"))


if __name__ == "__main__":
    flags.DEFINE_string("peer", "", "torch: time PyTorch beside ours.")
    flags.DEFINE_string("network", "inception_resnet_v1", "A name of models.NETWORKS; the peer knows inception_resnet_v1 and small_resnet.")
    flags.DEFINE_integer("size", 0, "Side of the images in pixels; 0: the network's usual one.", lower_bound=0)
    flags.DEFINE_integer("batch", 32, "Images a step.", lower_bound=4)
    flags.DEFINE_integer("images_per_person", 4, "Images of one person in a batch.", lower_bound=2)
    flags.DEFINE_enum("dtype", "float32", list(TOLERANCES), "Precision of the network; mining and loss are float32.")
    flags.DEFINE_enum(
        "compile",
        "",
        ["", "none", "default", "reduce-overhead", "max-autotune"],
        "torch.compile mode; empty: default on a GPU, none on CPU.",
    )
    flags.DEFINE_integer("steps", 0, "Steps timed together; 0: 1 on CPU, 10 on a GPU.", lower_bound=0)
    flags.DEFINE_string("profile", "", "A directory for a profile of our step.")
    timing.define_flags(repeats=5)
    command_line.run(main)
