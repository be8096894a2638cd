"""Where fetched weights are kept."""

import os
from pathlib import Path


def cached_path(name: str) -> Path:
    """The portable file of a published network by name, whether it is there or not."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "facenet_jax" / "weights"
    return Path(os.environ.get("FACENET_JAX_CACHE", default)) / f"{name}.safetensors"
