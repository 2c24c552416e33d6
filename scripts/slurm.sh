#!/usr/bin/env bash
#SBATCH --job-name=yuan
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#
# Trains on all GPUs of all nodes of a Slurm job, with a process for each. What follows the script's
# name goes to `yuan pretrain`; the directory of the run must be one that all nodes see.
#
#     cargo build --release -p yuan-cli --features cuda
#     sbatch scripts/slurm.sh --data /shared/text --run /shared/runs/first --data-parallel 2
#
# PROGRAM names the built program, which must be visible on all nodes too. If a process is lost the
# job ends with a sentence; submit it again with --resume.
set -euo pipefail
program=${PROGRAM:-target/release/yuan}
gpus=${SLURM_GPUS_ON_NODE:-8}
# Only this job's processes may take part; srun hands its environment on.
export YUAN_TOKEN=${YUAN_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
devices=$(seq -s, -f 'cuda:%g' 0 $((gpus - 1)))
exec srun --kill-on-bad-exit=1 "$program" pretrain --device "$devices" "$@"
