#!/usr/bin/env bash
# Train under SLURM on one node or many, one task per GPU:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 12:00:00 launch/slurm.sh experiment=cogvideox_5b_sft data.path=...
# Submit it from the repository, on a file system that all nodes share, after bash launch/install.sh. Two minutes before the time
# limit training gets USR1, saves a checkpoint and ends with 75; the job is queued again and goes on where it stopped: docs/cluster.md.
# STAGE=prepare: another stage. CONTAINER=image.sqsh (pyxis) or image.sif (apptainer): run inside of it, with CONTAINER_MOUNTS=a:b,c:d.
# COGFLOW_FRUITLESS=3: after so many starts without a new checkpoint the job is not started again.
#SBATCH --job-name=cogflow
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
[ -f launch/common.sh ] || { echo "slurm.sh: submit it from the repository, not from $PWD" >&2; exit 2; }
source launch/common.sh
say() { echo "slurm.sh $(date +%T): $*" >&2; }
asked="" asking="" step=""
on_signal() {
  interrupted=1 asked=1
  if [ -n "$step" ] && [ -z "$asking" ]; then
    say "the time limit is near; training saves a checkpoint after its step"
    keep_asking kill -s USR1 "$step" 2>/dev/null & # srun passes it on to every task
    asking=$!
  fi
}
trap on_signal USR1

in_container
# On this node, before any task starts: a mistake in the settings is said once, and the run's folder is known.
settings=$("${once[@]}" "${inside[@]}" "$python" -m cogflow --cfg "stage=${STAGE:-train}" "$@") || exit $?
run=$(setting "$settings" run root)/$(setting "$settings" run name)
export COGFLOW_EXIT_FILE=$run/slurm/$SLURM_JOB_ID.code COGFLOW_REPEATED=SIGUSR1
starts=$run/slurm/$SLURM_JOB_ID.starts
mkdir -p "$run/slurm"
rm -f "$COGFLOW_EXIT_FILE"

newest() { # checkpoint of the run, or "none"
  { ls "$run/checkpoints" 2>/dev/null || true; } | { grep -E '^step-[0-9]+$' || echo none; } | sort -V | tail -n 1
}

# SLURM starts a job again by itself when a node fails, however often: not when nothing came of it several times in a row.
before=$(newest)
echo "$before" >>"$starts"
fruitless=$(tac "$starts" | awk -v now="$before" '$0 != now {exit} {n++} END {print n - 1}')
if [ "$fruitless" -ge "${COGFLOW_FRUITLESS:-3}" ]; then
  say "$fruitless starts in a row brought no checkpoint newer than: $before. The job is given up; the log above says why."
  exit 1
fi
say "job $SLURM_JOB_ID, start $(wc -l <"$starts"), on $SLURM_JOB_NODELIST, newest checkpoint: $before"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=${MASTER_ADDR:-$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
export MASTER_ADDR MASTER_PORT

# No torchrun between: each rank is a task. The shell of a task outlives TERM, which training answers with a checkpoint. USR1 stays ignored
# until training listens to it. 75 is kept from srun, and every other failure for ten seconds: it would kill the ranks that are still
# closing their files or saying what is wrong. A task that SLURM shows its own GPU only (--gpus-per-task) finds it under number 0.
# shellcheck disable=SC2016 # the tasks expand it
task='
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  if [ "${CUDA_VISIBLE_DEVICES:+one}" ] && [ "$CUDA_VISIBLE_DEVICES" = "${CUDA_VISIBLE_DEVICES%,*}" ]; then LOCAL_RANK=0; fi
  trap "" USR1; trap : TERM
  code=0; "$@" || code=$?
  case $code in 0 | 75) exit 0 ;; esac
  if [ "$RANK" != 0 ]; then sleep 10; fi
  exit "$code"'
# srun takes it no more from sbatch by itself, and each rank would be left with one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
command=("${inside[@]}" "$python" -m cogflow "stage=${STAGE:-train}" "$@")
(trap '' USR1; exec srun --kill-on-bad-exit=1 "${containers[@]}" bash -c "$task" task "${command[@]}") &
step=$! launcher=$!
if [ -n "$asked" ]; then on_signal; fi
await "$step"
if [ -n "$asking" ]; then kill "$asking" 2>/dev/null || true; fi
# The ranks write down what they end with; srun tells the highest of what it saw, which may be that of its own kill.
written=$(head -n 1 "$COGFLOW_EXIT_FILE" 2>/dev/null || true)
if [ "${written:-0}" != 0 ]; then code=$written; fi
say "training ended with $code, newest checkpoint: $(newest)"

again() { # MESSAGE: queue the job again
  say "$1"
  scontrol requeue "$SLURM_JOB_ID" || say "SLURM does not queue the job again; submit it again and it goes on."
}
answering() { # whether every node of the job still runs what it is told
  timeout 300 srun --overlap --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 true
}
preempted() { # whether SLURM takes the nodes away for another job: it tells the tasks, and queues only those again that it has to kill
  scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}
case $code in
  75) # Only when SLURM asked for it: not after scancel, which signals the tasks.
    if [ -z "$asked" ] && ! preempted; then
      say "SLURM did not ask for this stop; the job is not queued again."
    elif [ "$(newest)" = "$before" ]; then
      say "this start brought no new checkpoint; the job is not queued again."
    else
      again "stopped in time; the job is queued again and goes on."
    fi
    ;;
  0 | 2 | 3) ;;
  *) # Cut short while it started; or a node is gone, which the ranks notice before SLURM does, each with an error of its own.
    if preempted; then
      again "the nodes are given to another job; the job is queued again and goes on."
    elif [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! answering; then
      again "a node does not answer; the job is queued again and goes on."
    fi
    ;;
esac
exit "$code"
