#!/usr/bin/env bash
# Train on all GPUs of this machine (GPUS=n for fewer): bash launch/train_node.sh experiment=cogvideox_5b_sft model.path=... data.path=...
# The same command resumes. Prepare the clips first: STAGE=prepare bash launch/train_node.sh with the same words.
set -euo pipefail
NODES=1 exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" "$@"
