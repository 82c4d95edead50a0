#!/bin/sh
# All benchmarks, one after the other, into one file of benchmarks/results with a picture.
#     BUSI=Dataset_BUSI_with_GT PYTHON=.venv/bin/python sh benchmarks/run_all.sh [scratch folder]
# Each has LIMIT seconds (default 150) and a log of its own; what fails or takes longer is listed, the others count.
set -u
out=${1:-out/bench}
python=${PYTHON:-python}
limit=${LIMIT:-150}
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.log

bench() { # NAME WORDS...: python WORDS --out FILE
    name=$1
    shift
    echo "run_all: $name"
    timeout "$limit" "$python" "$@" --out "$out/$name.json" >"$out/$name.log" 2>&1 || {
        echo "$name: exit status $? (124: took more than $limit s)" >>"$out/$name.log"
        tail -n 1 "$out/$name.log"
    }
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    step="--size 256 --widths 64 128 256 512 1024 --steps 60"
else
    step="--steps 9"
fi
if [ -n "${BUSI:-}" ]; then
    bench loader -m benchmarks.loader --root "$BUSI" --rounds 2
else
    echo "BUSI is not set to the folder of the published data set" >"$out/loader.log"
fi
bench train_step -m benchmarks.train_step $step
for name in predict sampling latents; do
    bench $name -m benchmarks.$name
done
"$python" -m benchmarks.collect "$out"
