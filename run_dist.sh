#!/usr/bin/env bash
# Runs a command as the workers of a distributed job, with all the set-up it needs.
#
# ./run_dist.sh -n 2 -s 1 -- python train_kinetics.py --kv-store dist_sync ...       this machine
# ./run_dist.sh --launcher ssh -H Hosts -n 8 -- python train_kinetics.py ...         those of Hosts
# ./run_dist.sh --launcher slurm|mpi -n 8 -- python train_kinetics.py ...            srun, mpirun
# ./run_dist.sh --help
#
# "python" is the environment's; the command runs in the folder that this script was called from.
set -euo pipefail
glore_caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh
cd "$glore_caller"
export PATH="$glore_venv/bin:$PATH"
exec "$PYTHON" "$glore_root/launch.py" "$@"
