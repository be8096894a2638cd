"""FaceNet in JAX: face embeddings trained with triplets over the global batch."""

__version__ = "0.1.0"

__all__ = ["load"]


def __getattr__(name: str):
    # Loaded on first use: `import facenet_jax` alone must not start JAX, whose settings come from the environment.
    if name == "load":
        from facenet_jax.inference import load

        return load
    raise AttributeError(f"module 'facenet_jax' has no attribute {name!r}")
