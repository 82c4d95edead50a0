#!/bin/sh
# All benchmarks, one after the other, into one file of benchmarks/results with a picture.
#     BUSI=Dataset_BUSI_with_GT PYTHON=.venv/bin/python sh benchmarks/run_all.sh [scratch folder]
# The result goes to RESULTS (default benchmarks/results).
# Each has LIMIT seconds (default 150) and a log of its own; what fails or takes longer is listed, the others count.
# QUICK=1 takes toy sizes: it shows that all of them work here, and its figures mean nothing.
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

loader="--rounds 2" predict="" sampling="" latents="" shared="" kernels=""
if [ -n "${QUICK:-}" ]; then
    step="--size 32 --widths 4 8 8 8 16 --steps 3 --rungs channels_last phase_upconv"
    loader="--rounds 1 --batches 3"
    predict="--size 64 --count 4 --rounds 1"
    sampling="--preset demo --batch 2 --rounds 1 --steps 4 --fast-steps 2 --reference 0"
    latents="--preset demo --rounds 1 --steps 2"
    shared="--size 32 --widths 4 8 8 8 16 --runs 1 2 --seconds 1"
    kernels="--quick --op upconv"
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    step="--size 256 --widths 64 128 256 512 1024 --steps 30 --seconds 180"
else
    step="--steps 9 --seconds 180"
fi
if [ -n "${BUSI:-}" ]; then
    bench loader -m benchmarks.loader --root "$BUSI" $loader
    bench predict -m benchmarks.predict --images "$BUSI" $predict
else
    for name in loader predict; do
        echo "BUSI is not set to the folder of the published data set" >"$out/$name.log"
    done
fi
bench runs_per_gpu -m benchmarks.runs_per_gpu $shared
bench sampling -m benchmarks.sampling $sampling
bench latents -m benchmarks.latents $latents
limit=$((limit + 150)) # these begin nothing new after 180 and 240 seconds
bench train_step -m benchmarks.train_step $step
bench kernels -m mgcc_dist.kernels.bench $kernels
"$python" -m benchmarks.collect "$out" --out "${RESULTS:-benchmarks/results}"
