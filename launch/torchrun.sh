#!/usr/bin/env bash
# Train with torchrun on several nodes. Run the same command on each, after bash launch/install.sh on a file system that they share:
#   NODES=2 MASTER=node1:29500 bash launch/torchrun.sh experiment=cogvideox_5b_sft model.path=... data.path=...
# NODES: number of nodes (default 1). MASTER: one of the nodes and a free port on it. GPUS: processes on this node (default: its
# GPUs). STAGE: default train. After TERM, USR1 or Ctrl-C on one node, all nodes save a checkpoint and end with 75. The same commands
# resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
nodes=${NODES:-1}
if [ "$nodes" = 1 ]; then
  find_python install
  meeting=(--standalone)
else
  find_python
  master=${MASTER:?set MASTER=host:port, the same on every node}
  meeting=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id cogflow --rdzv-endpoint "$master")
fi
gpus=${GPUS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
relay "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$gpus" --no-python \
  "${rank[@]}" "$python" -m cogflow "stage=${STAGE:-train}" "$@"
