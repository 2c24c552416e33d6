#!/usr/bin/env bash
#SBATCH --job-name=yuan
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#
# Trains on all GPUs of all nodes of a Slurm job: a worker for every GPU, and one process on the first node that drives
# them. What follows the script's name goes to `yuan pretrain`.
#
#     cargo build --release -p yuan-cli --features cuda,remote
#     sbatch scripts/slurm.sh --data /shared/text --run /shared/runs/first --data-parallel 2
#
# PROGRAM names the built program (it must be visible on all nodes), PORT the first port of a node,
# GPUS the devices of a node. If a node is lost the job ends with a sentence; submit it again with --resume.
set -euo pipefail
program=${PROGRAM:-target/release/yuan}
port=${PORT:-7600}
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
device=${DEVICE:-cuda}

if [ "${1:-}" = --workers-of-this-node ]; then
    # One process for each device: they share nothing, and one that dies takes no other with it.
    for ((gpu = 0; gpu < gpus; gpu++)); do
        name=$device
        [ "$device" = cuda ] && name=cuda:$gpu
        "$program" worker --device "$name" --listen "0.0.0.0:$((port + gpu))" &
    done
    trap 'kill $(jobs -p) 2>/dev/null' EXIT TERM INT
    # The first that ends ends the node, and with it the job.
    wait -n
    exit 1
fi

# Only this job's processes may compute on its workers; srun hands its environment on.
export YUAN_TOKEN=${YUAN_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
nodes=${NODES:-$(scontrol show hostnames "$SLURM_JOB_NODELIST")}
devices=
for node in $nodes; do
    for ((gpu = 0; gpu < gpus; gpu++)); do devices+=${devices:+,}ws://$node:$((port + gpu)); done
done

# srun starts one task on every node; without Slurm (NODES=localhost) this machine is the only one.
launch=()
if [ -n "${SLURM_JOB_ID:-}" ]; then launch=(srun --kill-on-bad-exit=1); fi
"${launch[@]}" bash "$0" --workers-of-this-node &
workers=$!
trap 'kill $workers 2>/dev/null; wait $workers 2>/dev/null || true' EXIT
"$program" pretrain --device "$devices" "$@"
