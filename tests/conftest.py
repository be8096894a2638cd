"""Eight simulated devices for every test, and the shared data where they are."""

import os
from pathlib import Path

from tests.one_device import ONE_DEVICE

# Eight devices on two busy cores may wait for each other longer than the 40 seconds after which XLA ends the process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        ONE_DEVICE,
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_collective_timeout_seconds=600",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from facenet_jax import parallel

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Tests that run the same program again take it from the cache, as real runs do; pytest's processes share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    jax.config.update("jax_compilation_cache_dir", str(base / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden files; tests that need it are skipped elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, the project's data and golden files")
    return SHARED


@pytest.fixture(params=[1, 8], ids=["1device", "8devices"])
def mesh(request: pytest.FixtureRequest):
    """The same test on one and on eight devices."""
    return parallel.make_mesh(jax.devices()[: request.param])
