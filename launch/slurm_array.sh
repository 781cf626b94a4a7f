#!/usr/bin/env bash
# Run one training several times as a job array; each task is a separate run. With several seeds (runs <run.name>-seed-<n>):
#   sbatch --array 0-3 --nodes 1 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm_array.sh run.name=mine experiment=cogvideox_5b_sft ...
# SWEEP=FILE: with other settings instead; task n takes the words of line n of FILE, counted from 0 (runs <run.name>-<n>).
# Prepare the clips once before: STAGE=prepare sbatch ... launch/slurm.sh run.name=mine ... All tasks train on these clips.
# Everything else is as in launch/slurm.sh: each task of the array saves, is queued again and resumes independently.
#SBATCH --job-name=cogflow-array
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%A_%a.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
[ -f launch/common.sh ] || { echo "slurm_array.sh: submit the job from the repository, not from $PWD" >&2; exit 2; }
source launch/common.sh
task=${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array 0-3}
if [ -n "${SWEEP:-}" ]; then
  line=$(sed -n "$((task + 1))p" "$SWEEP")
  [ -n "$line" ] || fail "$SWEEP has no line for task $task; it has $(wc -l <"$SWEEP") lines, and tasks count from 0."
  read -ra own <<<"$line"
  suffix=$task
else
  own=("stage.seed=$task")
  suffix=seed-$task
fi
in_container
settings=$("${once[@]}" "${inside[@]}" "$python" -m cogflow --cfg stage=train "$@") || exit $?
root=$(setting "$settings" run root)
name=$(setting "$settings" run name)
[ -e "$root/$name/cache" ] ||
  fail "$root/$name/cache is missing. Prepare the clips of run.name=$name first: STAGE=prepare sbatch launch/slurm.sh ..."
mkdir -p "$root/$name-$suffix"
ln -sfn "../$name/cache" "$root/$name-$suffix/cache"
# A setting of the task replaces the same setting of all tasks.
words=()
for word in "$@"; do
  case " run.name=x ${own[*]} " in *" ${word%%=*}="*) ;; *) words+=("$word") ;; esac
done
exec bash launch/slurm.sh "${words[@]}" "run.name=$name-$suffix" "${own[@]}"
