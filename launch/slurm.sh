#!/usr/bin/env bash
# Train over several nodes: sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh experiment=cogvideox_5b_sft model.path=... data.path=...
# Submit it from the repository, on a file system all nodes share, after bash launch/install.sh. On USR1, two minutes before
# the time limit, training saves a checkpoint and ends with 75; the job is then queued again and goes on.
#SBATCH --job-name=cogflow
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
venv=${COGFLOW_VENV:-.venv}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-1}
srun --kill-on-bad-exit=1 "$venv/bin/python" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" -m cogflow stage=train "$@" &
step=$!
trap 'scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1
code=0
while kill -0 "$step" 2>/dev/null; do code=0; wait "$step" || code=$?; done
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
