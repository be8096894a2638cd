"""What a backend's compiler is told: the options that the train step, embedding and detection are compiled with."""

import os
from functools import lru_cache
from typing import Any

import jax

# Which operations XLA's CPU backend hands to YNNPACK. jaxlib 0.10.2 gives it convolutions too, and there it falls to a quarter of the speed of XLA's own
# code from a batch of 8 on (79x79 images, 3x3, 32 channels, no padding: 18 against 75 GFLOP/s); its matrix products are the faster ones.
_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
_CPU = {_YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


@lru_cache
def options(platform: str = "") -> dict[str, Any]:
    """`compiler_options` of `jax.jit` for a platform ("cpu", "gpu", "tpu"; JAX's own choice where it is empty). What XLA_FLAGS says goes before. A program with options
    cannot be called inside another."""
    if (platform or jax.default_backend()) != "cpu" or _YNNPACK in os.environ.get("XLA_FLAGS", ""):
        return {}
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:  # A jaxlib that does not know the option.
        return {}
    return _CPU
