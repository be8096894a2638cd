"""The house: imports point one way, and libraries that change often are known to one file each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {"facenet_jax": 0, "data_pipelines": 1, "experiments": 2, "tests": 3}
ONE_FILE = {"orbax": "facenet_jax/training/checkpoints.py", "grain": "data_pipelines/loader.py"}
FILES = sorted(path for package in ("facenet_jax", "data_pipelines", "experiments") for path in (ROOT / package).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    here = path.relative_to(ROOT)
    for name in imports(path):
        top = name.split(".")[0]
        assert RANK.get(top, 0) <= RANK[here.parts[0]], f"{here} imports {name}"
        assert top != "tensorflow", f"{here} imports {name}"
        # Benchmarks time the peer beside us; its files are read by one importer, inside the function that needs it.
        assert top != "torch" or "benchmarks" in here.parts or str(here) == "facenet_jax/weights/torch.py", f"{here} imports {name}"
        if top in ONE_FILE and not (top == "grain" and here.name == "sources.py"):
            assert str(here) == ONE_FILE[top], f"{here} imports {name}"
        if name.startswith("jax.sharding") or name == "jax.distributed":
            assert here.name in ("parallel.py", "triplet.py", "step.py", "loop.py"), f"{here} imports {name}"


def test_mesh_is_made_in_one_file():
    for path in FILES:
        if path.name != "parallel.py":
            text = path.read_text()
            assert "shard_map" not in text and "jax.distributed.initialize" not in text, path


def test_import_starts_no_backend():
    """Hosts can join only before JAX's backends start."""
    code = "import experiments.train; from jax._src import xla_bridge; raise SystemExit(xla_bridge.backends_are_initialized())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
