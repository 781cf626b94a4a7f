#!/usr/bin/env bash
# The same training many times, as one job array; each task is a run of its own. From several seeds, <run.name>-seed-<n>:
#   sbatch --array 0-3 --nodes 1 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm_array.sh run.name=mine experiment=cogvideox_5b_sft ...
# SWEEP=FILE: with other words instead, task n with those of line n of FILE, counted from 0; <run.name>-<n>.
# Prepare the clips first, once: STAGE=prepare sbatch ... launch/slurm.sh run.name=mine ... All of them train on these.
# Everything else as in launch/slurm.sh: each task of the array saves, is queued again and goes on by itself.
#SBATCH --job-name=cogflow-array
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%A_%a.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
[ -f launch/common.sh ] || { echo "slurm_array.sh: submit it from the repository, not from $PWD" >&2; exit 2; }
source launch/common.sh
task=${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array 0-3}
if [ -n "${SWEEP:-}" ]; then
  line=$(sed -n "$((task + 1))p" "$SWEEP")
  [ -n "$line" ] || fail "$SWEEP has no line for task $task; it has $(wc -l <"$SWEEP"), and tasks count from 0."
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
[ -e "$root/$name/cache" ] || fail "$root/$name/cache is missing. Prepare the clips of run.name=$name first: STAGE=prepare sbatch launch/slurm.sh ..."
mkdir -p "$root/$name-$suffix"
ln -sfn "../$name/cache" "$root/$name-$suffix/cache"
# A setting of its own takes the place of that of all.
words=()
for word in "$@"; do
  case " run.name=x ${own[*]} " in *" ${word%%=*}="*) ;; *) words+=("$word") ;; esac
done
exec bash launch/slurm.sh "${words[@]}" "run.name=$name-$suffix" "${own[@]}"
