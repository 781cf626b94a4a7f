#!/usr/bin/env bash
# Train over several nodes, one task per GPU:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh experiment=cogvideox_5b_sft model.path=... data.path=...
# Submit it from the repository, on a file system that all nodes share, after bash launch/install.sh. Two minutes before the time
# limit training gets USR1, saves a checkpoint and ends with 75; the job is queued again and goes on where it stopped.
#SBATCH --job-name=cogflow
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
export COGFLOW_PYTHON="${COGFLOW_VENV:-$PWD/.venv}/bin/python"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# No torchrun between: each rank is a task, so that signals reach it and its exit code comes back.
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec "$COGFLOW_PYTHON" -m cogflow stage=train "$@"' cogflow "$@" &
step=$!
trap 'scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1
while :; do
  code=0
  wait "$step" || code=$?
  if [ "$code" -le 128 ]; then break; fi
  # The wait was broken off by the signal, or the step died of one.
  if ! kill -0 "$step" 2>/dev/null; then
    code=0
    wait "$step" || code=$?
    break
  fi
done
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
