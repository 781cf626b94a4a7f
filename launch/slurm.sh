#!/usr/bin/env bash
# Train under SLURM on one node or many, one task per GPU:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 12:00:00 launch/slurm.sh experiment=cogvideox_5b_sft data.path=...
# Submit it from the repository, on a file system that all nodes share, after bash launch/install.sh. Two minutes before the time limit
# training receives USR1, saves a checkpoint and ends with 75. The job is then queued again and resumes (docs/cluster.md).
# STAGE=prepare: another stage. CONTAINER=image.sqsh (pyxis) or image.sif (apptainer): run in it, with CONTAINER_MOUNTS=a:b,c:d.
# COGFLOW_FRUITLESS=3: number of starts without a new checkpoint after which the job is not started again.
#SBATCH --job-name=cogflow
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
[ -f launch/common.sh ] || { echo "slurm.sh: submit the job from the repository, not from $PWD" >&2; exit 2; }
source launch/common.sh
log() { echo "slurm.sh $(date +%T): $*" >&2; }
asked="" asking="" step=""
on_signal() {
  interrupted=1 asked=1
  if [ -n "$step" ] && [ -z "$asking" ]; then
    log "the time limit is near; training saves a checkpoint after the current step and ends"
    keep_asking kill -s USR1 "$step" 2>/dev/null & # srun forwards the signal to every task
    asking=$!
  fi
}
trap on_signal USR1

in_container
# Compose the settings on this node before any task starts: a mistake in them is reported once, and the run's folder is known.
settings=$("${once[@]}" "${inside[@]}" "$python" -m cogflow --cfg "stage=${STAGE:-train}" "$@") || exit $?
run=$(setting "$settings" run root)/$(setting "$settings" run name)
export COGFLOW_EXIT_FILE=$run/slurm/$SLURM_JOB_ID.code COGFLOW_REPEATED=SIGUSR1
starts=$run/slurm/$SLURM_JOB_ID.starts
mkdir -p "$run/slurm" || { log "the run folder $run cannot be written. Choose another with run.root or run.name."; exit 2; }
rm -f "$COGFLOW_EXIT_FILE"

newest() { # print the name of the run's newest checkpoint, or "none"
  { ls "$run/checkpoints" 2>/dev/null || true; } | { grep -E '^step-[0-9]+$' || echo none; } | sort -V | tail -n 1
}

# SLURM restarts a job whenever a node fails, without limit. Give up after several starts in a row without a new checkpoint.
before=$(newest)
echo "$before" >>"$starts"
fruitless=$(tac "$starts" | awk -v now="$before" '$0 != now {exit} {n++} END {print n - 1}')
if [ "$fruitless" -ge "${COGFLOW_FRUITLESS:-3}" ]; then
  log "$fruitless starts in a row saved no checkpoint newer than: $before. The job is not started again; the log above has the errors."
  exit 1
fi
log "job $SLURM_JOB_ID, start $(wc -l <"$starts"), on $SLURM_JOB_NODELIST, newest checkpoint: $before"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=${MASTER_ADDR:-$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
export MASTER_ADDR MASTER_PORT

# Each rank is a task; torchrun is not used. The shell of a task survives TERM, on which training saves a checkpoint. USR1 is ignored until
# training installs its handler. The shell hides 75 from srun and delays every other failure by ten seconds: srun would kill the ranks that
# still close their files or report an error. In a task that sees only its own GPU (--gpus-per-task), the GPU has number 0.
# shellcheck disable=SC2016 # the tasks expand it
task='
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  if [ "${CUDA_VISIBLE_DEVICES:+one}" ] && [ "$CUDA_VISIBLE_DEVICES" = "${CUDA_VISIBLE_DEVICES%,*}" ]; then LOCAL_RANK=0; fi
  trap "" USR1; trap : TERM
  code=0; "$@" || code=$?
  case $code in 0 | 75) exit 0 ;; esac
  if [ "$RANK" != 0 ]; then sleep 10; fi
  exit "$code"'
# Newer versions of srun do not inherit this from sbatch, and each rank would get one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
command=("${inside[@]}" "$python" -m cogflow "stage=${STAGE:-train}" "$@")
(trap '' USR1; exec srun --kill-on-bad-exit=1 "${containers[@]}" bash -c "$task" task "${command[@]}") &
step=$! launcher=$!
if [ -n "$asked" ]; then on_signal; fi
await "$step"
if [ -n "$asking" ]; then kill "$asking" 2>/dev/null || true; fi
# The ranks write their exit codes to a file. srun returns the highest code, which may come from its own kill.
written=$(head -n 1 "$COGFLOW_EXIT_FILE" 2>/dev/null || true)
if [ "${written:-0}" != 0 ]; then code=$written; fi
log "training ended with $code, newest checkpoint: $(newest)"

requeue() { # MESSAGE: queue the job again
  log "$1"
  scontrol requeue "$SLURM_JOB_ID" || log "SLURM does not queue the job again. Submit the same job again to resume."
}
nodes_answer() { # succeed when every node of the job still runs commands
  timeout 300 srun --overlap --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 true
}
# Succeed when SLURM gives the nodes to another job. It signals the tasks, and queues only those jobs again that it has to kill.
preempted() {
  scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}
case $code in
  75) # Queue again only when SLURM asked for the stop, and not after scancel, which signals the tasks.
    if [ -z "$asked" ] && ! preempted; then
      log "SLURM did not ask for this stop; the job is not queued again."
    elif [ "$(newest)" = "$before" ]; then
      log "this start saved no new checkpoint; the job is not queued again."
    else
      requeue "training saved a checkpoint in time; the job is queued again and resumes."
    fi
    ;;
  0 | 2 | 3) ;;
  *) # Preempted during its start, or a node failed: the ranks notice that before SLURM does, each with its own error.
    if preempted; then
      requeue "SLURM gives the nodes to another job; the job is queued again and resumes."
    elif [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && ! nodes_answer; then
      requeue "a node does not answer; the job is queued again and resumes."
    fi
    ;;
esac
exit "$code"
