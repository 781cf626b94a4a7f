#!/usr/bin/env bash
# The same training from several seeds, as one job array; each is a run of its own, <run.name>-seed-<n>:
#   sbatch --array 0-3 --nodes 1 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm_seeds.sh run.name=mine experiment=cogvideox_5b_sft ...
# Prepare the clips first, once: STAGE=prepare sbatch ... launch/slurm.sh run.name=mine ... All of them train on these.
# Everything else as in launch/slurm.sh: each task of the array saves, is queued again and goes on by itself.
#SBATCH --job-name=cogflow-seeds
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%A_%a.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
[ -f launch/common.sh ] || { echo "slurm_seeds.sh: submit it from the repository, not from $PWD" >&2; exit 2; }
source launch/common.sh
seed=${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array 0-3}
in_container
settings=$("${once[@]}" "${inside[@]}" "$python" -m cogflow --cfg stage=train "$@") || exit $?
root=$(setting "$settings" run root)
name=$(setting "$settings" run name)
[ -e "$root/$name/cache" ] || fail "$root/$name/cache is missing. Prepare the clips of run.name=$name first: STAGE=prepare sbatch launch/slurm.sh ..."
mkdir -p "$root/$name-seed-$seed"
ln -sfn "../$name/cache" "$root/$name-seed-$seed/cache"
words=()
for word in "$@"; do
  case $word in run.name=* | stage.seed=*) ;; *) words+=("$word") ;; esac
done
exec bash launch/slurm.sh "${words[@]}" "run.name=$name-seed-$seed" "stage.seed=$seed"
