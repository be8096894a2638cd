#!/usr/bin/env bash
# Trains on a Cloud TPU: creates or reuses the machine, copies this commit, runs one command on every worker, goes on after preemption.
#
#   ./launch_tpu.sh --name=tpu1 --zone=us-west4-a --accelerator=v5litepod-16 --spot --bucket=BUCKET --config=CONFIG.py
#   ./launch_tpu.sh ... --dry_run    prints every command instead, and compiles the train step for that TPU (no account, no network);
#                                    with --command it compiles nothing
#   ./launch_tpu.sh --local ...      runs the command here
#
# The machine
#   --name=NAME  --zone=ZONE  --accelerator=TYPE   v5litepod-16, v4-32, v5p-8, v6e-256 ...
#   --version=VERSION      runtime image; known for v2 to v6e
#   --queued               ask by a queued resource and wait for it
#   --spot                 cheaper, may be taken away
#   --create_flags="..."   more words for the creating command (--network=..., --service-account=..., --data-disk=...)
#   --delete               delete the machine after success
# The run
#   --config=FILE          experiments.train's config; words after -- go to experiments.train too (-- --config.steps=9)
#   --command=COMMAND      run this instead; it finds $FACENET_JAX_RUN_ID, _COMMIT, _WORKDIR and _DATA_DIR
#   --setup=COMMAND        runs on every worker before (copy data, mount a disk)
#   --bucket=BUCKET        mounted on every worker by gcsfuse; needed with several workers, and to go on after preemption
#   --workdir=DIR          runs/RUN_ID, in the bucket or else on the machine
#   --data_dir=DIR         data, likewise
#   --run_id=ID            NAME-COMMIT; a run that goes on keeps it
#   --repo=URL             workers clone this instead of getting a copy from here
#   --allow_dirty          take what is not committed along
#   --collect=A,B          files of the workdir brought to runs/RUN_ID; a run without the first has not ended. Of experiments.train:
#                          evaluation.json,metrics.jsonl,report.html,weights.safetensors
#   --tries=20  --poll=30  how often the command is started; seconds between looks
#   --topology=v5e:4x4     for --dry_run, where TYPE is not known; several with commas
set -euo pipefail

name='' zone='' accelerator='' version='' queued='' spot='' create_flags='' delete='' topology='' dry_run='' local=''
config='' command='' trains='' setup='' bucket='' workdir='' data_dir=data run_id='' repo='' allow_dirty='' collect='' tries=20 poll=30

bad() {
  echo "error: $1; --help lists the flags" >&2
  exit 2
}
say() { echo "launch_tpu: $*" >&2; }
quoted() { # Words as a shell would read them back; newlines stay newlines.
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }"
}

while (($#)); do
  case $1 in
    --name=* | --zone=* | --accelerator=* | --version=* | --create_flags=* | --topology=* | --config=* | --command=* | --setup=* | \
      --bucket=* | --workdir=* | --data_dir=* | --run_id=* | --repo=* | --collect=* | --tries=* | --poll=*)
      key=${1%%=*} && printf -v "${key#--}" %s "${1#*=}"
      ;;
    --queued | --spot | --delete | --allow_dirty | --dry_run | --local) printf -v "${1#--}" yes ;;
    --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" && exit ;;
    --) shift && break ;;
    *) bad "'$1' is not a flag, or lacks its =value" ;;
  esac
  shift
done

[[ $tries =~ ^[1-9][0-9]*$ ]] || bad "--tries=$tries: a number above 0"
[[ $poll =~ ^[0-9]+$ ]] || bad "--poll=$poll: seconds"
[[ -z $run_id || $run_id =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || bad "--run_id=$run_id: letters, digits, . _ -"
[[ $workdir$data_dir != *gs:/* ]] ||
  bad "training reads and writes files: mount the bucket with --bucket=BUCKET, and give --workdir and --data_dir inside it"
[[ -z $command || -z $config$* ]] || bad "--command runs as it is: put --config and what follows -- inside it"
bucket=${bucket#gs://} bucket=${bucket%/}
[[ $bucket != */* ]] || bad "--bucket=$bucket: the bucket alone; directories go to --workdir and --data_dir"
[[ -z $local || -z $dry_run ]] || bad "--local or --dry_run, not both"
if [[ -z $local ]]; then
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || bad "--name=$name: small letters, digits and -"
  [[ $zone =~ ^[a-z0-9-]+$ ]] || bad "--zone=$zone: such as us-west4-a"
  [[ $accelerator =~ ^[a-z0-9]+-[0-9]+$ ]] || bad "--accelerator=$accelerator: such as v5litepod-16"
  case $accelerator in
    v[234]-*) image=tpu-ubuntu2204-base ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    *) image='' ;;
  esac
  version=${version:-$image}
  [[ $version ]] || bad "no runtime image known for $accelerator: give --version (gcloud compute tpus tpu-vm versions list --zone=$zone)"
fi

if [[ $dry_run && -z $topology$command ]]; then
  declare -A flat=([1]=1x1 [4]=2x2 [8]=2x4 [16]=4x4 [32]=4x8 [64]=8x8 [128]=8x16 [256]=16x16)
  declare -A deep=([8]=2x2x1 [16]=2x2x2 [32]=2x2x4 [64]=2x4x4 [128]=4x4x4 [256]=4x4x8 [512]=4x8x8 [1024]=8x8x8)
  size=${accelerator#*-}
  case $accelerator in
    v5litepod-*) topology=v5e:${flat[$size]-} ;;
    v6e-*) topology=v6e:${flat[$size]-} ;;
    v4-* | v5p-*) topology=${accelerator%-*}:${deep[$size]-} ;; # the number of cores, two a chip
  esac
  [[ $topology == *:?* ]] || bad "no topology known for $accelerator: give --topology, such as v5e:4x4"
fi

cd "$(dirname "${BASH_SOURCE[0]}")"
commit=$(git rev-parse HEAD) || bad "$PWD is no git checkout"
changes=$(git status --porcelain)
short=${commit:0:10}${changes:+-dirty} commit=$commit${changes:+-dirty}
if [[ $changes && -z $local$dry_run ]]; then
  [[ $allow_dirty ]] || bad "not committed: $(head -n 1 <<<"$changes") ...; commit, or --allow_dirty"
  [[ -z $repo ]] || bad "--repo gives workers what is committed and pushed, not --allow_dirty"
fi
run_id=${run_id:-${name:-local}-$short}
here=runs/$run_id
logs=$here/logs/$(date -u +%Y%m%dT%H%M%S)
workdir=${workdir:-$here}
if [[ -z $command ]]; then
  trains=yes
  collect=${collect:-evaluation.json,metrics.jsonl,report.html,weights.safetensors}
  # shellcheck disable=SC2016 # Filled where it runs; the last on each worker: how the workers of a pod find each other.
  command='python -m experiments.train --workdir="$FACENET_JAX_WORKDIR" --data_dir="$FACENET_JAX_DATA_DIR"'
  [[ -z $config ]] || command+=" $(quoted "--config=$config")"
  (($# == 0)) || command+=" $(quoted "$@")"
  # shellcheck disable=SC2016
  [[ $local ]] || command+=' $FACENET_JAX_JOIN'
fi

if [[ $local ]]; then
  mkdir -p "$workdir" "$logs"
  export FACENET_JAX_RUN_ID=$run_id FACENET_JAX_COMMIT=$commit FACENET_JAX_WORKDIR=$workdir FACENET_JAX_DATA_DIR=$data_dir
  echo "$run_id $commit $command" >>"$workdir/launches.txt"
  [[ -z $setup ]] || bash -c "$setup"
  PYTHONUNBUFFERED=1 bash -c "$command" 2>&1 | tee -a "$logs/0.log"
  exit
fi

# What workers run: these functions' text is sent over ssh. All paths are below ~/facenet_jax.
worker_unpack() { # [URL COMMIT]
  mkdir -p ~/facenet_jax && cd ~/facenet_jax && rm -rf src && mkdir src || return
  if (($#)); then git clone --quiet "$1" src && git -C src checkout --quiet "$2"; else tar -xzf ~/facenet_jax.tgz -C src; fi
}
worker_install() {
  # The images' Python is older than JAX asks for; uv brings one.
  cd ~/facenet_jax && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv || return
  [[ -x venv/bin/python ]] || python3 -m uv venv --quiet --python=3.11 venv || return
  python3 -m uv pip install --quiet --python=venv/bin/python -r src/requirements.txt 'jax[tpu]'
}
worker_mount() { # BUCKET
  local keys=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/gcsfuse.list from=https://packages.cloud.google.com/apt
  mkdir -p ~/facenet_jax/bucket || return
  ! mountpoint -q ~/facenet_jax/bucket || return 0
  if ! command -v gcsfuse >/dev/null; then
    curl -fsS $from/doc/apt-key.gpg | sudo tee $keys >/dev/null || return
    echo "deb [signed-by=$keys] $from gcsfuse-$(lsb_release -cs) main" | sudo tee $list >/dev/null || return
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install gcsfuse || return
  fi
  # Checkpoints become whole by renaming a directory, and every worker must see at once what another wrote.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$1" ~/facenet_jax/bucket
}
worker_setup() { # COMMAND
  cd ~/facenet_jax/src && eval "$1"
}
worker_run() { # RUN_ID COMMIT WORKDIR DATA_DIR BASE COMMAND PROOF
  local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes ends=() index=0 FACENET_JAX_JOIN=''
  mkdir -p ~/facenet_jax/"$5" && cd ~/facenet_jax/"$5" && mkdir -p "$3" || return
  export FACENET_JAX_RUN_ID=$1 FACENET_JAX_COMMIT=$2 PYTHONUNBUFFERED=1 FACENET_JAX_JOIN
  FACENET_JAX_WORKDIR=$(realpath -m "$3") FACENET_JAX_DATA_DIR=$(realpath -m "$4") && export FACENET_JAX_WORKDIR FACENET_JAX_DATA_DIR
  # Each is an address, or name:id:address; none where this is no TPU VM.
  IFS=, read -ra ends < <(curl -fsS -m 20 -H Metadata-Flavor:Google $url/worker-network-endpoints) || true
  if ((${#ends[@]} > 1)); then
    index=$(curl -fsS -m 20 -H Metadata-Flavor:Google $url/agent-worker-number) || return
    FACENET_JAX_JOIN="--coordinator=${ends[0]##*:}:8476 --process_count=${#ends[@]} --process_index=$index"
  fi
  ((index)) || echo "$1 $2 $6" >>"$FACENET_JAX_WORKDIR/launches.txt"
  # A former run whose connection was lost still holds the TPU: it is asked to save and end.
  fuser -s -k -TERM ~/facenet_jax/lock 2>/dev/null
  exec 9>>~/facenet_jax/lock && flock -w 900 9 || return
  export PATH=~/facenet_jax/venv/bin:$PATH
  trap : TERM # The command saves and ends with 0, here it is told from one that came to its end.
  cd ~/facenet_jax/src && bash -c "$6" || return
  ((index)) || [[ -z $7 || -f $FACENET_JAX_WORKDIR/$7 ]] || { echo "stopped before its end" && return 75; }
}

scratch=$(mktemp -d) follower='' log_flag=()
trap 'rm -rf "$scratch"; [[ -z $follower ]] || kill "$follower"' EXIT
gcloud_tpu() {
  if [[ $dry_run ]]; then quoted gcloud compute tpus "$@"; else gcloud compute tpus "$@"; fi
}
on_workers() { # FUNCTION [ARGUMENT ...]
  gcloud_tpu tpu-vm ssh "$name" "--zone=$zone" --worker=all "${log_flag[@]}" --ssh-flag=-oServerAliveInterval=30 \
    "--command=$(declare -f "$1")"$'\n'"$(quoted "$@")"
}

ask() { # RESOURCE FIELD: its value; ABSENT; UNREACHABLE where gcloud could not tell.
  gcloud_tpu "$1" describe "$name" "--zone=$zone" "--format=value($2)" 2>"$scratch/errors" && return
  if grep -q NOT_FOUND "$scratch/errors"; then echo ABSENT; else cat "$scratch/errors" >&2 && echo UNREACHABLE; fi
}
machine_state() {
  local state
  if [[ $queued ]]; then
    state=$(ask queued-resources state.state)
    [[ $state == ACTIVE ]] || { echo "${state:-UNKNOWN}" && return; }
  fi
  state=$(ask tpu-vm state)
  # A node that went from under its active queued resource is lost, not absent: the request must be deleted first.
  [[ $queued && $state == ABSENT ]] && state=TERMINATED
  echo "${state:-UNKNOWN}"
}
create_machine() {
  local more=()
  read -ra more <<<"${spot:+--spot }$create_flags"
  if [[ $queued ]]; then
    gcloud_tpu queued-resources create "$name" "--node-id=$name" "--zone=$zone" "--accelerator-type=$accelerator" \
      "--runtime-version=$version" "${more[@]}"
  else
    gcloud_tpu tpu-vm create "$name" "--zone=$zone" "--accelerator-type=$accelerator" "--version=$version" "${more[@]}"
  fi
}
delete_machine() {
  if [[ $queued ]]; then
    gcloud_tpu queued-resources delete "$name" "--zone=$zone" --force --quiet
  else
    gcloud_tpu tpu-vm delete "$name" "--zone=$zone" --quiet
  fi
}
seen=''
get_machine() { # Returns when it is ready.
  local state
  while state=$(machine_state); do
    [[ $state == "$seen" ]] || say "$name is $state"
    seen=$state
    case $state in
      READY) return ;;
      ABSENT) create_machine || return ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete_machine || return ;;
      STOPPED) gcloud_tpu tpu-vm start "$name" "--zone=$zone" || return ;;
      FAILED | UNKNOWN | UNREACHABLE | HIDDEN) return 1 ;;
      *) sleep "$poll" ;;
    esac
  done
}

prepare_workers() {
  if [[ $repo ]]; then
    on_workers worker_unpack "$repo" "${commit%-dirty}" || return
  else
    gcloud_tpu tpu-vm scp "$here/source.tgz" "$name:facenet_jax.tgz" "--zone=$zone" --worker=all || return
    on_workers worker_unpack || return
  fi
  on_workers worker_install || return
  [[ -z $bucket ]] || on_workers worker_mount "$bucket" || return
  [[ -z $setup ]] || on_workers worker_setup "$setup"
}
run_command() {
  local log_flag=("--output-directory=$logs/$1") code=0
  local arguments=("$run_id" "$commit" "$workdir" "$data_dir" "${bucket:+bucket}" "$command" "${collect%%,*}")
  [[ -z $dry_run ]] || { on_workers worker_run "${arguments[@]}" && return; }
  mkdir -p "$logs/$1" && : >"$logs/$1/0.log"
  tail -n +1 -f "$logs/$1/0.log" &
  follower=$!
  on_workers worker_run "${arguments[@]}" </dev/null || code=$?
  sleep 0.5 # the last lines
  kill "$follower" && follower=''
  return $code
}
collect_results() {
  local names=() sources=() file
  IFS=, read -ra names <<<"$collect"
  for file in "${names[@]}"; do
    file=$workdir/$file
    [[ $file == /* ]] || file=facenet_jax/${bucket:+bucket/}$file
    sources+=("$name:$file")
  done
  gcloud_tpu tpu-vm scp "${sources[@]}" "$here/" "--zone=$zone" --worker=0
}

if [[ $dry_run ]]; then
  [[ -z $queued ]] || ask queued-resources state.state
  ask tpu-vm state
  create_machine
  [[ $repo ]] || quoted git archive --format=tar.gz "--output=$here/source.tgz" "${commit%-dirty}"
  prepare_workers
  run_command 1
  [[ -z $collect ]] || collect_results
  [[ -z $delete ]] || delete_machine
  [[ $trains ]] || { say "nothing is compiled: what --command trains is not known here" && exit; }
  mkdir -p "$here"
  # Of experiments.train's flags those of the config, with their values; where there is no config, its default.
  words=() flag=''
  for word; do
    [[ ! $word =~ ^--?[a-z] ]] || flag=$word
    [[ ! $flag =~ ^--?(no)?config([.=]|$) ]] || words+=("$word")
  done
  [[ " ${words[*]} " =~ \ --?config[=\ ] ]] || config=${config:-experiments/configs/synthetic.py}
  compile=(python -m experiments.aot_compile "--topology=$topology" "--output=$here/aot.json" ${config:+"--config=$config"} "${words[@]}")
  quoted "${compile[@]}"
  "${compile[@]}"
  exit
fi

get_machine || exit
mkdir -p "$here"
# A tree without a commit, by an index of its own: what is committed, and with --allow_dirty what git does not ignore beside it.
export GIT_INDEX_FILE=$scratch/index
git read-tree HEAD
git add --all
git archive --format=tar.gz "--output=$here/source.tgz" "$(git write-tree)"
unset GIT_INDEX_FILE
[[ $bucket ]] || say "no --bucket: the run lives on the machine alone, starts anew after preemption, and several workers cannot share it"

for ((try = 1; ; try++)); do
  code=0 stage=machine
  { get_machine && stage=workers && prepare_workers && stage='command' && run_command "$try"; } || code=$?
  ((code)) || break
  ((try < tries)) || { say "gave up after $tries tries with $code; $name is left as it is" && exit "$code"; }
  # The connection ends before the state says why.
  sleep "$poll"
  state=$(machine_state)
  say "try $try of $tries ended with $code; $name is $state"
  case $state in
    READY)
      # 255: ssh lost the connection. 75 and 143: the command was stopped. Everything else is the command's own failure.
      [[ $code =~ ^(255|75|143)$ || $stage == machine ]] || { say "$name is left running, and costs until it is deleted" && exit "$code"; }
      # Ready and out of reach before anything ran: another machine may do, if the run does not live on this one.
      [[ $stage != workers || -z $bucket ]] || delete_machine || true
      ;;
    FAILED) exit "$code" ;;
  esac
done

[[ -z $collect ]] || collect_results || { say "not all of $collect came back from $workdir; $name is left running" && exit 1; }
say "$here: $collect"
if [[ $delete ]]; then delete_machine; else say "$name is left running, and costs until it is deleted (--delete)"; fi
