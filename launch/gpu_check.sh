#!/usr/bin/env bash
# What only a GPU can show, in at most 13 minutes: tests/gpu, then the benchmarks. Results go to OUT (default gpu_check)
# as they come, so that a run which is cut short keeps what it had; a summary comes last.
#
#     bash launch/gpu_check.sh [--wheels DIR] [OUT]      on a machine with a GPU
#     bash launch/gpu_check.sh --rehearse [OUT]          the same on a CPU, with tiny shapes: shows that it runs
#
# What the benchmarks answer: bench-256, images/s beside the published float32 step's and the share of the matrix product;
# bench-32, what small batches lose of that; bench-32-graphs, what of it CUDA graphs give back; bench-32-zero2, what ZeRO's buckets
# cost one GPU.
# --tests, --benchmarks: that part alone.
# --wheels DIR: packages that the machine lacks and cannot fetch, installed beside its own for this run alone.
# PYTHON: the interpreter that has torch; else .venv/bin/python where there is one, else python3.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=gpu_check rehearse='' wheels='' only=''
while [ $# -gt 0 ]; do
    case $1 in
    --rehearse) rehearse=1 ;;
    --tests | --benchmarks) only=$1 ;;
    --wheels)
        [ $# -ge 2 ] || { echo "gpu_check.sh: --wheels needs a folder" >&2; exit 2; }
        wheels=$2
        shift
        ;;
    -*)
        echo "gpu_check.sh: '$1' is no option; it takes --rehearse, --tests, --benchmarks, --wheels DIR and a results folder" >&2
        exit 2
        ;;
    *) out=$1 ;;
    esac
    shift
done
if [ -n "$wheels" ] && ! ls "$wheels"/*.whl >/dev/null 2>&1; then
    echo "gpu_check.sh: --wheels: '$wheels' has no wheels" >&2
    exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "gpu_check.sh: '$python' has no torch; set PYTHON to one that has, e.g. PYTHON=/path/to/venv/bin/python" >&2
    exit 2
fi
site=''
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
fi
export PYTHONPATH="${site:+$site:}$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
[ -z "$rehearse" ] || export MMTARD_GPU_TESTS=rehearse OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHDYNAMO_DISABLE=1

limit=780 slower=1 # seconds in all
[ -z "$rehearse" ] || { limit=3600 slower=6; } # a CPU that others use, too
began=$(date +%s)
left() { echo $((limit - $(date +%s) + began)); }

# part NAME SECONDS COMMAND... : runs it, at most so long, into OUT/NAME.txt; a line of how it went into OUT/summary.txt.
part() {
    local name=$1 most=$2 status=0 start
    shift 2
    start=$(date +%s)
    most=$((most * slower))
    [ "$most" -le "$(left)" ] || most=$(left)
    if [ "$most" -lt 5 ]; then
        echo "$name: no time was left" | tee -a "$out/summary.txt"
        return
    fi
    echo "== $name: $*"
    timeout -k 10 "$most" "$@" 2>&1 | tee "$out/$name.txt" || status=$?
    [ "$status" != 124 ] || echo "(cut off after $most s)" | tee -a "$out/$name.txt"
    echo "$name: exit $status after $(($(date +%s) - start)) s" >>"$out/summary.txt"
    [ "$status" = 0 ] || failed=1
}

failed=0
: >"$out/summary.txt"
part machine 60 "$python" -c '
import shutil, subprocess
import torch
from mmtard.distributed.gpu_driver import driver_version
print("torch", torch.__version__, "for CUDA", torch.version.cuda, "driver", driver_version())
print(torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {torch.get_num_threads()} threads")
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi"])
'
[ "$only" = --benchmarks ] || part tests 230 "$python" -m pytest tests/gpu -v -s -ra -p no:cacheprovider --durations=8
# bench NAME IMAGES SECONDS SETTINGS_AND_FLAGS... : the training step at its real shapes, on random images.
bench() {
    local name=$1 images=$2 most=$3
    shift 3
    local what=(benchmarks/vitb32_vitl14 engine.device=cuda engine.precision=bf16 "train.batch_size=$images" "$@")
    if [ -n "$rehearse" ]; then
        local tiny=$PWD/mmtard/examples/tiny_clip.json
        what=(benchmarks/vitb32_vitl14 "train.batch_size=$((images / 8))")
        while [[ ${1-} == *.*=* ]]; do what+=("$1") && shift; done # its settings, not its flags
        what+=(--warm-up 1 --rounds 1 --steps 1 --classes 10)
        what+=("student.arch=$tiny" "teachers.clean.arch=$tiny" "teachers.robust.arch=$tiny")
    fi
    part "$name" "$most" "$python" -m mmtard bench train "${what[@]}" --out "$out/$name.json"
}
if [ "$only" != --tests ]; then
    # The published step computes in float32 and is not compiled: four of its steps are what the time allows.
    bench bench-256 256 270 --against published --variants published mmtard "mmtard, clean stored" \
        "mmtard, every target stored" "mmtard, no attack copy" "mmtard, uncompiled" --warm-up 1 --rounds 3 --steps 1
    bench bench-32 32 90 engine.compile=on --variants mmtard "mmtard, uncompiled" --warm-up 2 --rounds 3 --steps 4
    bench bench-32-graphs 32 90 engine.compile=graphs --variants mmtard --warm-up 2 --rounds 3 --steps 4
    bench bench-32-zero2 32 90 engine.compile=graphs engine.zero_stage=2 --variants mmtard \
        --warm-up 2 --rounds 3 --steps 4
fi
grep -hE '^(=+ .*(passed|failed|error)|FAILED|ERROR|ZeRO |SKIPPED \[)' "$out/tests.txt" >>"$out/summary.txt" 2>/dev/null
echo "== summary, $((limit - $(left))) s in all${rehearse:+, rehearsed on the CPU}"
cat "$out/summary.txt"
exit "$failed"
