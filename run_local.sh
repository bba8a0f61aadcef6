#!/usr/bin/env bash
# Trains on this machine, with all the set-up it needs, then tests the checkpoint.
#
# ./run_local.sh                            a small GloRe network on generated demo videos
# ./run_local.sh --network RESNET50_GLORE   the full network on the same videos
# ./run_local.sh --dataset Kinetics ...     any job: arguments go through to train_kinetics.py and
#                                           come after the defaults below, so that they win
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh

network=TINY_GLORE dataset=Demo models=./exps/models task= option= trial=
for argument in "$@"; do
    case "$argument" in
    -h | --help) exec "$PYTHON" train_kinetics.py --help ;;
    --dry-run) trial=1 ;;
    --network=*) network=${argument#*=} ;;
    --dataset=*) dataset=${argument#*=} ;;
    --task-name=*) task=${argument#*=} ;;
    --model-dir=*) models=${argument#*=} ;;
    esac
    case "$option" in
    --network) network=$argument ;;
    --dataset) dataset=$argument ;;
    --task-name) task=$argument ;;
    --model-dir) models=$argument ;;
    esac
    option=$argument
done

# A name of its own for each run: an earlier run's checkpoints are never in the way.
name="local-$(date +%Y%m%d-%H%M%S)"
defaults=(--network TINY_GLORE --dataset Demo --task-name "$name" --keep 2)
case "$dataset/$network" in
Demo/TINY* | Demo/tiny*) ;;
# Networks of full size: a classifier of 2,048 features is unsteady at the small network's rate.
Demo/*) defaults+=(--lr-base 0.005 --dropout 0 --end-epoch 2) ;;
esac
"$PYTHON" train_kinetics.py "${defaults[@]}" "$@"
[ -z "$trial" ] || exit 0
checkpoint="$models/${task:-$name}_ep"
"$PYTHON" evaluate.py "$checkpoint"
cat <<EOF

What to run next (. .venv/bin/activate):
  ./run_local.sh --network RESNET50_GLORE                     the full network on these videos
  python evaluate.py $checkpoint --num-clips 4 --num-crops 3
  python predict.py $checkpoint dataset/Demo/raw/data/val_avi-96p
  python serve.py $checkpoint                                 a page that takes videos
  python train_kinetics.py --dataset Kinetics --dry-run       says how your own data should lie
EOF
