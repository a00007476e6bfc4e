#!/usr/bin/env bash
# The same command on every machine, with the name of one of them, which must outlive the job:
#   MAIN=node1 NODES=4 examples/scale/several_nodes.sh --out /shared/run --parallel hsdp [pretrain options]
# --out lies on a disk that all machines see. NODES=2:4 goes on with two machines where others are lost, and takes them
# back. Ranks find each other over the network that leads to MAIN; where that is another one than their host names'
# (containers, several cards), name its interface: GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1.
set -euo pipefail
: "${MAIN:?the machine where all meet}" "${NODES:?how many machines, or FEWEST:MOST}"
ranks=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
[ "$ranks" -gt 0 ] || ranks=1
# In the store that PyTorch 2.13 shares between starts, addresses of dead ranks remain, and newcomers wait forever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec python -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$MAIN:${PORT:-29400}" --rdzv-id "${JOB:-llmfast}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} -m llmfast pretrain "$@"
