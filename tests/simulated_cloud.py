"""A gcloud whose machines are directories: what is sent to workers really runs in them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch_tpu.sh"

# A machine is absent, or in a state with one home per worker. `plan` says what happens to the command of each try.
GCLOUD = """
import json, os, shutil, subprocess, sys
from pathlib import Path
root = Path(os.environ["FAKE"])
world = json.loads((root / "world.json").read_text())
words = sys.argv[1:]
with open(root / "calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
flags = dict(word[2:].split("=", 1) if "=" in word else (word[2:], True) for word in words if word.startswith("--"))
names = [word for word in words if not word.startswith("--")]
assert names[:2] == ["compute", "tpus"] and flags["zone"] == "z-1", words
kind, verb, *names = names[2:]

def leave(code=0):
    (root / "world.json").write_text(json.dumps(world))
    sys.exit(code)

def boot():
    for index in range(world["workers"]):
        shutil.rmtree(root / f"worker{index}", ignore_errors=True)
        (root / f"worker{index}").mkdir()
    world["node"] = "READY"

def local(path):  # name:path -> the file in worker 0
    return path if ":" not in path else str(root / "worker0" / path.split(":", 1)[1])

def run(index, output, wait=True):
    environment = {**os.environ, "HOME": str(root / f"worker{index}"), "WORKER": str(index), "WORKERS": str(world["workers"])}
    shell = subprocess.Popen(["bash", "-c", flags["command"]], env=environment, stdout=output, stderr=output, start_new_session=True)
    return shell.wait() if wait else 0

if verb == "describe":
    if kind == "queued-resources" and world["queue"]:
        print(world["queue"][0])
        if len(world["queue"]) > 1:
            world["queue"].pop(0)
            world["queue"][0] == "ACTIVE" and boot()
        leave()
    if kind == "tpu-vm" and world["node"] != "ABSENT":
        print(world["node"])
        world["node"] = world["node"].replace("CREATING", "READY")
        leave()
    sys.exit(print(f"ERROR: (gcloud) {world['problem']}", file=sys.stderr) or 1)
elif verb == "create" and kind == "tpu-vm":
    assert world["node"] == "ABSENT" and flags["accelerator-type"] and flags["version"]
    if world["stockouts"]:
        world["stockouts"] -= 1
        leave(print("ERROR: no more capacity", file=sys.stderr) or 1)
    boot()
elif verb == "create":
    assert not world["queue"] and world["node"] == "ABSENT" and flags["node-id"] == names[0] and flags["runtime-version"]
    world["queue"] = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
elif verb == "delete":
    assert flags["quiet"] and (kind == "tpu-vm" or flags["force"])
    world["node"], world["queue"] = "ABSENT", []
elif verb == "start":
    world["node"] = "READY"
elif verb == "scp":
    assert world["node"] == "READY"
    *sources, target = names
    if ":" in target:
        for index in range(world["workers"]):
            shutil.copy(sources[0], root / f"worker{index}" / target.split(":")[1])
    else:
        for source in sources:
            shutil.copy(local(source), target)
elif verb == "ssh":
    assert world["node"] == "READY" and flags["worker"] == "all"
    event = world["plan"].pop(0) if "output-directory" in flags and world["plan"] else ""
    codes = []
    for index in range(world["workers"]):
        output = open(Path(flags["output-directory"]) / f"{index}.log", "w") if "output-directory" in flags else None
        codes.append(run(index, output, wait=event != "disconnect"))
    if event == "preempt":
        world["node"], world["queue"] = "PREEMPTED", ["SUSPENDING", "SUSPENDED"] if world["queue"] else []
    if event == "disconnect":
        import time; time.sleep(2)
    leave(255 if event else next((code for code in codes if code), 0))
else:
    sys.exit(f"unexpected: {words}")
leave()
"""

# What the workers find: an installer that installs nothing, a bucket that is a directory, the metadata of a pod.
TOOLS = {
    "python3": """
case "$*" in
  "-m pip install --quiet --user uv") ;;
  "-m uv venv --quiet --python=3.11 venv") mkdir -p venv/bin && cp "$(command -v python)" venv/bin/python ;;
  "-m uv pip install --quiet --python=venv/bin/python -r src/requirements.txt jax[tpu]") [[ -f src/requirements.txt ]] ;;
  *) echo "unexpected: python3 $*" && exit 9 ;;
esac""",
    "mountpoint": "[[ -L $2 ]]",
    "gcsfuse": 'rmdir "${@: -1}" && mkdir -p "$FAKE/buckets/${*: -2:1}" && ln -s "$FAKE/buckets/${*: -2:1}" "${@: -1}"',
    "curl": """
case "${*: -1}" in
  */worker-network-endpoints) for ((i = 0; i < WORKERS; i++)); do printf '%s' "${comma-}u:u:10.0.0.$((7 + i))"; comma=,; done ;;
  */agent-worker-number) echo "$WORKER" ;;
  *) exit 22 ;;
esac""",
    "python": f'exec {sys.executable} "$@"',
}
TRAIN = """
import os, pathlib, sys
print("train", *sys.argv[1:], os.environ["FACENET_JAX_RUN_ID"], os.environ["FACENET_JAX_COMMIT"])
workdir = pathlib.Path(os.environ["FACENET_JAX_WORKDIR"])
for name in ("evaluation.json", "metrics.jsonl", "report.html", "weights.safetensors"):
    (workdir / name).write_text(name)
"""
COUNT = 'n=$(cat "$FACENET_JAX_WORKDIR/n" 2>/dev/null || echo 0); echo "goes on from $n"; echo $((n + 1)) >"$FACENET_JAX_WORKDIR/n"'
MACHINE = ("--name=tpu1", "--zone=z-1", "--accelerator=v5litepod-16", "--poll=0")


class Cloud:
    """A checkout, and the simulated gcloud first on its PATH."""

    def __init__(self, root: Path) -> None:
        self.root, self.checkout = root, root / "checkout"
        for directory in ("bin", "checkout/experiments", "buckets"):
            (root / directory).mkdir(parents=True)
        for name, text in TOOLS.items():
            self.write(f"bin/{name}", f"#!/usr/bin/env bash\n{text}\n")
        self.write("bin/gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        shutil.copy(SCRIPT, self.checkout)
        self.write("checkout/requirements.txt", "")
        self.write("checkout/.gitignore", "/runs/\n__pycache__/\n")
        self.write("checkout/experiments/train.py", TRAIN)
        self.write("checkout/experiments/aot_compile.py", "import sys; print('compiled', *sys.argv[1:])")
        self.git("init", "--quiet")
        self.commit()
        self.world()

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)
        (self.root / name).chmod(0o755)

    def git(self, *words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=self.checkout, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=a")
        return self.git("rev-parse", "HEAD")

    def world(self, node="ABSENT", queue=(), plan=(), workers=1, stockouts=0, problem="NOT_FOUND: it was not found") -> None:
        state = {"node": node, "queue": list(queue), "plan": list(plan), "workers": workers, "stockouts": stockouts, "problem": problem}
        self.write("world.json", json.dumps(state))
        for index in range(workers):
            (self.root / f"worker{index}").mkdir(exist_ok=True)

    def launch(self, *flags: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "FAKE": str(self.root), "HOME": str(self.root)}
        return subprocess.run(
            ["./launch_tpu.sh", *flags], cwd=self.checkout, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.root / "calls.jsonl"
        return [json.loads(line)[2:] for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, *words: str) -> int:
        return sum(call[: len(words)] == list(words) for call in self.calls)

    @property
    def commands(self) -> list[str]:
        """What was run on workers, try by try."""
        found = [word for call in self.calls for word in call if word.startswith("--command=worker_run")]
        return [word for word in found if "worker_run ()" in word]

    def log(self, run_id: str, worker: int = 0) -> str:
        logs = sorted((self.checkout / "runs" / run_id / "logs").glob(f"*/*/{worker}.log"))
        return "".join(path.read_text() for path in logs)
