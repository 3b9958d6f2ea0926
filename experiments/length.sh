#!/usr/bin/env bash
# Trained with 256 tokens, how do the kinds do on 2048, with RoPE and without (NoPE)? 24 minutes on two cores.
# bash experiments/length.sh          OUT=out/trial SEEDS=1 STEPS=50 bash experiments/length.sh
set -euo pipefail
out=${OUT:-out/length}
[ -d data/stdlib ] || python prepare_data.py
export OMP_NUM_THREADS=1  # two runs at a time, a core for each
for kind in attention,swa:64 "attention,swa:64 --rope_base=0,10000" \
            rat:16,swa:64 "rat:16,swa:64 --rope_base=0,10000" rnn; do
  for seed in ${SEEDS:-1 2 3}; do echo --layers=$kind --seed=$seed --out="$out/${kind// /}/$seed"; done
done | xargs -P 2 -L 1 python train.py --steps=${STEPS:-800} --batch_tokens=2048 --sample_tokens=0
for run in $out/*/*; do
  echo $run
  python experiments/inspect_model.py "$run" --context=2048 --tokens=262144
done
