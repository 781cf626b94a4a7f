#!/usr/bin/env bash
# Train on all GPUs of this machine (GPUS=n for fewer): bash launch/train_node.sh experiment=cogvideox_5b_sft model.path=... data.path=...
# The same command goes on where it stopped. Prepare the clips first: the same words with stage=prepare.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
gpus=${GPUS:-$("$venv/bin/python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec "$venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m cogflow stage=train "$@"
