#!/usr/bin/env bash
# What do the kinds of layer learn from the default data in 500 steps of 2048 tokens? 20 minutes on two cores.
# bash experiments/quality.sh         OUT=out/trial SEEDS=1 STEPS=50 bash experiments/quality.sh
set -euo pipefail
out=${OUT:-out/quality}
[ -d data/stdlib ] || python prepare_data.py
export OMP_NUM_THREADS=1  # two runs at a time, a core for each
for kind in attention swa:64 rnn rat:4 rat:16 rat:64 rat:16,swa:64; do
  for seed in ${SEEDS:-1 2 3}; do echo --layers=$kind --seed=$seed --out=$out/$kind/$seed; done
done | xargs -P 2 -L 1 python train.py --steps=${STEPS:-500} --batch_tokens=2048 --eval_every=50 \
  --sample_tokens=0
python experiments/compare.py "$out"
