#!/usr/bin/env bash
# sbatch --nodes 4 examples/scale/slurm.sh --out /shared/run --parallel hsdp [pretrain options]
#SBATCH --job-name=llmfast
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
# Two minutes before its time is up, SLURM's signal reaches every rank: the run saves and ends. A job that is queued
# again goes on from there.
set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN=${nodes%%$'\n'*} NODES=$SLURM_JOB_NUM_NODES JOB=$SLURM_JOB_ID RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-1}}
resume=()
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || resume=(--resume)
# sbatch runs a copy of this file: the scripts are looked for where the job was submitted.
exec srun "$SLURM_SUBMIT_DIR/examples/scale/several_nodes.sh" "$@" "${resume[@]}"
