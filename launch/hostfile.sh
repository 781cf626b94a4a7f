#!/usr/bin/env bash
# Train on the hosts of a DeepSpeed hostfile, whose lines read "node1 slots=8", from a machine that reaches them by ssh without a password:
#   HOSTFILE=hostfile bash launch/hostfile.sh experiment=cogvideox_5b_sft model.path=... data.path=...
# The repository with its .venv has the same path on all hosts. MASTER_ADDR: address of the first host (default: its name in the
# hostfile). MASTER_PORT: free port on it (default 29500). REMOTE: command that runs another on a host (default ssh -o BatchMode=yes).
# STAGE: default train. DeepSpeed's launcher starts the ranks of each host, without pdsh and MPI: with these a signal kills training
# before it saves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
find_python
hostfile=$(realpath "${HOSTFILE:?set HOSTFILE to a file with lines such as: node1 slots=8}")
port=${MASTER_PORT:-29500}
read -ra remote <<<"${REMOTE:-ssh -o BatchMode=yes}"
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF {print $1}')
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile names no host; its lines read: node1 slots=8"
master=${MASTER_ADDR:-${hosts[0]}}

if [ -n "${HOSTFILE_NODE:-}" ]; then # on one of the hosts, started by the code below
  node=$HOSTFILE_NODE
  unset HOSTFILE_NODE
  # Signals arrive as their names on stdin, over ssh. stdin closes when the process that started this has ended.
  {
    while read -r word; do kill -s "$word" $$; done
    kill -s USR1 $$
  } <&0 2>/dev/null &
  listener=$!
  trap 'kill "$listener" 2>/dev/null || true' EXIT
  relay "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$node" --master_addr "$master" \
    --master_port "$port" --no_python --no_local_rank "${rank[@]}" "$python" -m cogflow "stage=${STAGE:-train}" "$@"
  exit
fi

# ssh does not transfer the environment. The command line holds no secrets: all users of the machine can read it.
words=$(printf '%q ' "HOSTFILE=$hostfile" "MASTER_ADDR=$master" "MASTER_PORT=$port" "COGFLOW_PYTHON=$python" "STAGE=${STAGE:-train}")
passed='^(NCCL_.*|TORCH_.*|UCX_.*|FI_.*|GLOO_.*|OMP_NUM_THREADS|PYTHONPATH|HF_HUB_OFFLINE|WANDB_MODE)$'
for name in $(compgen -e); do
  if [[ $name =~ $passed ]]; then words+=$(printf '%q ' "$name=${!name}"); fi
done
command="cd $(printf '%q' "$PWD") && env $words"
arguments=$(printf '%q ' bash launch/hostfile.sh "$@")
pipes=$(mktemp -d)
pids=() ends=() codes=()
set -m # Ctrl-C reaches this script and not ssh
for node in "${!hosts[@]}"; do
  mkfifo "$pipes/$node"
  "${remote[@]}" "${hosts[node]}" "$command HOSTFILE_NODE=$node $arguments" <"$pipes/$node" &
  pids[node]=$!
  exec {end}>"$pipes/$node"
  ends[node]=$end
done
set +m
rm -rf "$pipes"

send_signal() { # NAME: send a signal to every host that still runs
  local node
  for node in "${!ends[@]}"; do
    if [ -z "${codes[node]:-}" ]; then echo "$1" >&"${ends[node]}" || true; fi
  done
}
trap '' PIPE
trap 'send_signal USR1' USR1
trap 'send_signal TERM' TERM
trap 'send_signal HUP' HUP
trap 'send_signal INT' INT

# The other hosts would wait for a host that failed: ask them to stop, and after 60 seconds end them.
result=0 failed="" left=${#hosts[@]}
while [ "$left" -gt 0 ]; do
  sleep 1 || true
  for node in "${!hosts[@]}"; do
    if [ -n "${codes[node]:-}" ] || kill -0 "${pids[node]}" 2>/dev/null; then continue; fi
    codes[node]=0
    wait "${pids[node]}" || codes[node]=$?
    left=$((left - 1))
    if [ "${codes[node]}" = 0 ]; then continue; fi
    echo "hostfile.sh: ${hosts[node]} ended with ${codes[node]}" >&2
    if [ "$result" = 0 ]; then result=${codes[node]} failed=$SECONDS; send_signal USR1; fi
  done
  if [ -n "$failed" ] && [ $((SECONDS - failed)) -gt 60 ]; then send_signal INT; fi
done
exit "$result"
