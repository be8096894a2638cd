"""Random variables of a network, made without compiling it."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, size, seed=0):
    """Every tensor random, BatchNorm's statistics too, scaled so that values neither die nor grow with depth; float32."""
    random = np.random.default_rng(seed)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), False))

    def leaf(path, like):
        kind = path[-1].key
        if kind == "kernel":
            values = random.normal(size=like.shape) * (1.5 / np.prod(like.shape[:-1])) ** 0.5
        else:
            centre = {"scale": 1, "var": 1, "slope": 0.3}.get(kind, 0)
            values = centre + random.uniform(-0.2, 0.2, like.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, tree)
