#!/usr/bin/env bash
# What only a GPU can say about this branch, in at most 100 seconds. To be dropped before a merge.
device=${1:-cuda}
toys=${2:-400}
export PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=$(mktemp -d)
timeout 75 python gpu_measure.py "$device" 2>&1 | grep -v USDT | cut -c1-160
began=$(date +%s.%N)
timeout 30 python sample/toys.py --root "$XDG_CACHE_HOME" --instances "$toys" --seed 1 --device "$device" 2>&1 | tail -3
echo "$toys toys: $(awk -v a="$began" -v b="$(date +%s.%N)" 'BEGIN { print b - a }') s, start of the processes included"
timeout 30 python -m pytest -q tests/gpu/test_layernorm.py tests/gpu/test_training_graph.py 2>&1 | tail -4
timeout 40 torchrun --nproc_per_node=1 train.py prior --root sample/co3d --vae sample/nano.pt --steps 8 --frames 6 \
    --device "$device" --set batch=2 --out "$XDG_CACHE_HOME/t.pt" 2>&1 | tail -3
