#!/usr/bin/env bash
# What the launchers share; sourced by them, from the repository.
# shellcheck disable=SC2034 # what is set here is used there
set -euo pipefail

# fail MESSAGE: a mistake of the user, exit code 2.
fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Sets $python: COGFLOW_PYTHON, else the environment in .venv (COGFLOW_VENV: elsewhere), which "install" makes when it is missing.
find_python() {
  if [ -n "${COGFLOW_PYTHON:-}" ]; then
    python=$COGFLOW_PYTHON
  elif [ "${1:-}" = install ]; then
    source launch/install.sh
    python=$venv/bin/python
  else
    python=${COGFLOW_VENV:-$PWD/.venv}/bin/python
    [ -x "$python" ] || fail "$python was not found. Run bash launch/install.sh first, on a file system that all nodes share."
  fi
}

# setting YAML SECTION KEY: one value of what python -m cogflow --cfg printed.
setting() {
  sed -n "/^$2:/,/^[^ ]/{s/^  $3: //p}" <<<"$1" | sed "s/^'\(.*\)'$/\1/; s/''/'/g; s:^~/:$HOME/:"
}

# workers PID: the processes below PID that train, which are those that $rank started. Read from /proc: images may lack ps.
workers() {
  local -A children=()
  local stat line fields pid child queue=("$1")
  for stat in /proc/[0-9]*/stat; do
    { read -r line <"$stat"; } 2>/dev/null || continue
    read -ra fields <<<"${line##*) }"
    children[${fields[1]}]+=" ${line%% *}"
  done
  while [ ${#queue[@]} -gt 0 ]; do
    pid=${queue[0]}
    queue=("${queue[@]:1}")
    for child in ${children[$pid]:-}; do
      if grep -qszE '^COGFLOW_RANK=' "/proc/$child/environ"; then echo "$child"; else queue+=("$child"); fi
    done
  done
}

# signal_workers NAME: to every process that trains below $launcher.
signal_workers() {
  local pid
  for pid in $(workers "$launcher"); do kill -s "$1" "$pid" 2>/dev/null || true; done
}

# keep_asking COMMAND ...: until $launcher ends. Once is not enough: training that has not begun to listen yet ignores it.
keep_asking() {
  while kill -0 "$launcher" 2>/dev/null; do
    "$@"
    sleep 3
  done
}

# ask_to_stop NAME: the first signal asks training to save and end; TERM or Ctrl-C after that, but not as its echo, ends it at once.
ask_to_stop() {
  interrupted=1
  if [ -z "$asking" ]; then
    echo "$(basename "$0"): asked to stop by SIG$1; training saves a checkpoint after its step" >&2
    keep_asking signal_workers USR1 &
    asking=$! asked_at=$SECONDS
  elif [[ $1 = INT || $1 = TERM ]] && [ $((SECONDS - asked_at)) -gt 3 ]; then
    if [ -z "$ended" ]; then echo "$(basename "$0"): SIG$1 after that: ending at once; no checkpoint of this moment" >&2; fi
    ended=$((128 + $(kill -l "$1")))
    signal_workers KILL
  fi
}

# await PID: its exit code in $code, however many signals come in between.
await() {
  while :; do
    interrupted="" code=0
    wait "$1" || code=$?
    if [ -z "$interrupted" ]; then break; fi
  done
}

# What a launcher starts as each rank, before its words. TERM is ignored but while training listens to it: launchers send it when the first
# rank has ended, and the rank that is still closing its files, or saying what is wrong, would be cut short. DeepSpeed sends it to the
# children of ranks as well, W&B's among them: the others let rank 0 end first.
# shellcheck disable=SC2016 # the ranks expand it
rank=(bash -c '
  trap "" TERM
  code=0; COGFLOW_RANK=$RANK "$@" || code=$?
  if [ "$RANK" != 0 ] && [ "$RANK" = "${LOCAL_RANK:-}" ] && [ "$code" -gt 0 ] && [ "$code" -lt 128 ]; then sleep 10; fi
  exit "$code"' rank)

# relay COMMAND ...: run a launcher that starts the ranks (torchrun, deepspeed), and return what training returned.
#   Launchers kill their workers half a minute after a signal: it goes to the workers instead, and the launcher learns nothing of it.
#   Launchers turn 75 into 1 or into the signal with which they killed the rank that was last: the ranks write it down themselves.
relay() {
  local folder written
  folder=$(mktemp -d)
  export COGFLOW_EXIT_FILE=$folder/code
  unset RANK LOCAL_RANK WORLD_SIZE
  export COGFLOW_REPEATED=SIGUSR1
  asking="" launcher="" ended=""
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  trap 'ask_to_stop HUP' HUP
  trap 'ask_to_stop INT' INT
  # -m: a process group of its own, which Ctrl-C in the terminal does not reach.
  # USR1 stays ignored in the workers until training listens to it: one that comes while torch is loaded does not kill them.
  set -m
  (trap '' USR1; exec "$@") </dev/null &
  launcher=$!
  set +m
  await "$launcher"
  trap - USR1 TERM HUP INT
  if [ -n "$asking" ]; then kill "$asking" 2>/dev/null || true; fi
  written=$(head -n 1 "$COGFLOW_EXIT_FILE" 2>/dev/null || true)
  rm -rf "$folder"
  if [ -n "$ended" ]; then code=$ended; elif [ "$code" != 0 ] && [ "${written:-0}" != 0 ]; then code=$written; fi
  return "$code"
}

# Sets how a SLURM job runs its program: $containers (options of srun), $inside (what stands before the program), $once (what runs it once,
# on the first node) and $python.
in_container() {
  containers=() inside=() once=()
  if [ -z "${CONTAINER:-}" ]; then
    find_python
    return
  fi
  python=${COGFLOW_PYTHON:-python3}
  case $CONTAINER in
    *.sif) inside=(apptainer exec --nv --bind "$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --pwd "$PWD" "$CONTAINER") ;;
    *)
      containers=(--container-image="$CONTAINER" --container-workdir="$PWD")
      containers+=(--container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
      once=(srun --nodes 1 --ntasks 1 "${containers[@]}")
      ;;
  esac
}
