#!/usr/bin/env bash
# Functions of the launchers, which source this file from the root of the repository.
# shellcheck disable=SC2034 # the launchers use the variables that are set here
set -euo pipefail

# fail MESSAGE: report a mistake of the user and exit with 2.
fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# find_python [install]: set $python to COGFLOW_PYTHON, else to the interpreter of .venv (or COGFLOW_VENV).
# With "install" a missing environment is installed.
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

# setting YAML SECTION KEY: print one value of the YAML that python -m cogflow --cfg printed.
setting() {
  sed -n "/^$2:/,/^[^ ]/{s/^  $3: //p}" <<<"$1" | sed "s/^'\(.*\)'$/\1/; s/''/'/g; s:^~/:$HOME/:"
}

# workers PID: print the training processes below PID, which $rank started. It reads /proc, because images may lack ps.
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

# signal_workers NAME: send a signal to every training process below $launcher.
signal_workers() {
  local pid
  for pid in $(workers "$launcher"); do kill -s "$1" "$pid" 2>/dev/null || true; done
}

# keep_asking COMMAND ...: repeat a command until $launcher ends. Training ignores signals before it installs its handlers.
keep_asking() {
  while kill -0 "$launcher" 2>/dev/null; do
    "$@"
    sleep 3
  done
}

# ask_to_stop NAME: the first signal asks training to save and end; TERM or Ctrl-C more than 3 s later ends it at once.
ask_to_stop() {
  interrupted=1
  if [ -z "$asking" ]; then
    echo "$(basename "$0"): received SIG$1; training saves a checkpoint after the current step and ends" >&2
    keep_asking signal_workers USR1 &
    asking=$! asked_at=$SECONDS
  elif [[ $1 = INT || $1 = TERM ]] && [ $((SECONDS - asked_at)) -gt 3 ]; then
    if [ -z "$ended" ]; then echo "$(basename "$0"): received SIG$1 again; training ends at once without a checkpoint" >&2; fi
    ended=$((128 + $(kill -l "$1")))
    signal_workers KILL
  fi
}

# await PID: wait for a process and set $code to its exit code. Signals do not interrupt the wait.
await() {
  while :; do
    interrupted="" code=0
    wait "$1" || code=$?
    if [ -z "$interrupted" ]; then break; fi
  done
}

# The command that a launcher starts as each rank, before the words of cogflow. It ignores TERM while training has no handler for it:
# launchers send TERM when the first rank has ended, and a rank that closes its files or reports an error must not be cut short. DeepSpeed
# also sends it to the children of ranks, such as W&B's service: so the other ranks let rank 0 end first.
# shellcheck disable=SC2016 # the ranks expand it
rank=(bash -c '
  trap "" TERM
  code=0; COGFLOW_RANK=$RANK "$@" || code=$?
  if [ "$RANK" != 0 ] && [ "$RANK" = "${LOCAL_RANK:-}" ] && [ "$code" -gt 0 ] && [ "$code" -lt 128 ]; then sleep 10; fi
  exit "$code"' rank)

# relay COMMAND ...: run a launcher that starts the ranks (torchrun, deepspeed), and return the exit code of training.
#   Launchers kill their workers half a minute after a signal. So signals go to the workers only, and not to the launcher.
#   Launchers turn 75 into 1 or into the signal with which they killed the last rank. So the ranks write their code to a file.
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
  # -m: the launcher gets its own process group, which Ctrl-C in the terminal does not reach.
  # The workers ignore USR1 until training installs its handler: a signal during the import of torch does not kill them.
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

# in_container: set how a SLURM job runs its program: $containers (options of srun), $inside (prefix of the program), $once (prefix that
# runs it once, on the first node) and $python.
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
