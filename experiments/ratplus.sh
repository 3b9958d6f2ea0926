#!/usr/bin/env bash
# Is it the recurrence that survives dilation, or joint training? RAT+ and gated attention, trained jointly or
# dense, then with every D-th key, as trained and adapted for 40 steps. 40 minutes on two cores.
# bash experiments/ratplus.sh         OUT=out/trial SEEDS=1 STEPS=50 bash experiments/ratplus.sh
set -euo pipefail
out=${OUT:-out/ratplus}
[ -d data/stdlib ] || python prepare_data.py
export OMP_NUM_THREADS=1
steps=${STEPS:-400}
for seed in ${SEEDS:-1 2 3}; do
  echo --layers=rat+ --joint=rat+:64 --steps=$steps --seed=$seed --out=$out/trained/rat+/joint/$seed
  echo --layers=rat+ --joint=none --steps=$((2 * steps)) --seed=$seed --out=$out/trained/rat+/dense/$seed
  echo --layers=gated --joint=gated:64 --steps=$steps --seed=$seed --out=$out/trained/gated/joint/$seed
  echo --layers=gated --joint=none --steps=$((2 * steps)) --seed=$seed --out=$out/trained/gated/dense/$seed
done | xargs -P 2 -L 1 python train.py --context=1024 --batch_tokens=2048 --sample_tokens=0
for run in {rat+,gated}/{joint,dense}; do
  for D in 1 4 16 64; do
    for seed in ${SEEDS:-1 2 3}; do
      echo --init_from=$out/trained/$run/$seed --layers=${run%/*}:$D --out=$out/adapted/$run/$D/$seed
    done
  done
done | xargs -P 2 -L 1 python train.py --joint=none --lr=4e-4 --warmup=0 --steps=40 --batch_tokens=2048 \
  --sample_tokens=0
for run in {rat+,gated}/{joint,dense}; do
  for D in 1 4 16 64; do
    for seed in ${SEEDS:-1 2 3}; do
      echo $run $D $seed
      python train.py --init_from=$out/trained/$run/$seed --layers=${run%/*}:$D --eval_only | tail -1
    done
  done
done
python experiments/compare.py "$out/adapted"
