#!/usr/bin/env bash
# All GPUs of this machine (or, without any, RANKS processes on its CPU): examples/scale/one_node.sh [pretrain options]
# Where a rank fails, torchrun starts all of them again, and the run goes on from its newest checkpoint.
set -euo pipefail
ranks=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
[ "$ranks" -gt 0 ] || ranks=2
exec python -m torch.distributed.run --standalone --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-3}" \
    -m llmfast pretrain "$@"
