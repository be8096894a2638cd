"""The compiler's figures: parsing, rooflines, and a step lowered here for the devices at hand."""

import json
import os
import subprocess
import sys

import jax
import pytest

from experiments import aot_compile, roofline
from experiments.benchmarks import scaling
from experiments.configs import synthetic
from facenet_jax.errors import BadInput

HLO = """
  %gather = f32[1800,128]{1,0} all-gather(f32[450,128]{1,0} %x), replica_groups={{0,1,2,3}}
  %sum.1 = (f32[64]{0}, bf16[2,3]{1,0}) all-reduce(f32[64]{0} %a, bf16[2,3]{1,0} %b), to_apply=%add
  %start = (f32[450,128]{1,0}, f32[1800,128]{1,0}) all-gather-start(f32[450,128]{1,0} %y), dimensions={0}
  %done = f32[1800,128]{1,0} all-gather-done((f32[450,128]{1,0}, f32[1800,128]{1,0}) %start)
  %scatter = f32[450,128]{1,0} reduce-scatter(f32[1800,128]{1,0} %z), dimensions={0}
  %not = f32[4]{0} add(f32[4]{0} %p, f32[4]{0} %q)
"""


def test_collectives_are_counted_once_with_their_bytes():
    found = {entry["op"]: (entry["bytes"], entry["count"]) for entry in roofline.collectives(HLO)}
    assert found == {
        "all-gather": (2 * 1800 * 128 * 4, 2),
        "all-reduce": (64 * 4 + 6 * 2, 1),
        "reduce-scatter": (1800 * 128 * 4, 1),
    }
    assert roofline.network_bytes([{"op": "all-reduce", "bytes": 100, "count": 1}], 4) == 2 * 100 * 0.75
    assert roofline.network_bytes([{"op": "all-gather", "bytes": 100, "count": 1}], 1) == 0


def test_roofline_by_hand():
    chip = roofline.CHIPS["v5e"]
    limits = roofline.roofline(chip, 1.07e12, 20.0e9, 0)
    # The issue's own figures: 20.0 GB at 819 GB/s are 24.4 ms.
    assert limits.memory_s == pytest.approx(0.0244, abs=5e-5)
    assert limits.bound_by == "memory" and limits.step_s == limits.memory_s
    assert roofline.roofline(chip, 197e12, 1, 0).compute_s == pytest.approx(1)
    # A device of tpu7x is half a chip.
    assert roofline.roofline(roofline.CHIPS["tpu7x"], 2307e12 / 2, 1, 0).compute_s == pytest.approx(1)


def test_the_very_step_is_lowered_for_any_devices():
    config = synthetic.get_config()
    config.model.update(size=32, stem=4, widths=(4, 8), depths=(1, 1), embedding_size=8)
    config.batch.update(people=8, images_per_person=4)
    lowered = aot_compile.lower(config, jax.devices()[:8], 32, 100)
    text = lowered.compile().as_text()
    operations = {entry["op"]: entry for entry in roofline.collectives(text)}
    # The embeddings of the batch are gathered once: 32 rows of 8 floats.
    assert operations["all-gather"]["bytes"] >= 32 * 8 * 4
    assert "all-reduce" in operations


def test_what_is_refused():
    with pytest.raises(BadInput, match="no chip 'v9'"):
        roofline.chip_of("v9:2x2")
    config = synthetic.get_config()
    with pytest.raises(BadInput, match="does not divide"):
        aot_compile.lower(config, jax.devices()[:8], 12, 100)
    config.batch.images_per_person = 40
    with pytest.raises(BadInput, match="do not divide into people of 40"):
        aot_compile.rows_of(config, 16, 128)
    assert aot_compile.rows_of(config, 16, 120) == 1920
    assert aot_compile.rows_of(config, 16, 0) == config.batch.people * 40


def run(*arguments):
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, check=False)


def test_command_lines_say_what_is_missing():
    for arguments in (["experiments.aot_compile"], ["experiments.benchmarks.scaling"]):
        done = run(*arguments)
        assert done.returncode == 2 and "topolog" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = run("experiments.aot_compile", "--topology=v9:1x1")
    assert done.returncode == 2 and "v5e" in done.stderr
    if not _has_libtpu():
        done = run("experiments.aot_compile", "--topology=v5e:1x1", "--config=experiments/configs/synthetic.py")
        assert done.returncode == 2 and "requirements-aot.txt" in done.stderr


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


@pytest.mark.slow
def test_compiles_for_a_tpu_that_is_not_there(tmp_path):
    if not _has_libtpu():
        pytest.skip("needs requirements-aot.txt")
    settings = ["--config.model.size=32", "--config.batch.people=16", "--config.batch.images_per_person=4"]
    output = tmp_path / "aot.json"
    done = run(
        "experiments.aot_compile",
        "--config=experiments/configs/synthetic.py",
        "--topology=v5e:2x2,v6e:2x2",
        f"--output={output}",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert [entry["chips"] for entry in found] == [4, 4]
    for entry in found:
        assert entry["flops_per_chip"] > 0 and entry["hbm_bytes_per_chip"] > 0 and entry["peak_hbm_bytes"] > 0
        assert {operation["op"] for operation in entry["collectives"]} >= {"all-gather", "all-reduce"}
        assert entry["roofline"]["bound_by"] in ("compute", "memory", "network")
    done = run("experiments.aot_compile", "--config=experiments/configs/synthetic.py", "--topology=v5e:3x5", *settings)
    assert done.returncode == 2 and "v5e:3x5" in done.stderr


def test_efficiency_and_plot(tmp_path):
    entry = lambda chips, rate: {"topology": f"v5e:{chips}", "chips": chips, "global_batch": 120 * chips, "predicted_images_per_s": rate}
    found = [entry(1, 100.0), entry(4, 380.0)]
    assert scaling.efficiencies(found) == [1.0, 0.95]
    scaling.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
