#!/usr/bin/env bash
# What a GPU has to show: correct first, then fast. Each part has its own limit, and the next runs whatever comes of it.
#
#     bash examples/gpu_day.sh FOLDER        on a GPU, in under ten minutes
#     GPU_DAY_DRY=1 bash examples/gpu_day.sh FOLDER      the same steps on the CPU with tiny models, in about a minute
#
# GPU_DAY_SECONDS is the limit of all parts together (560), GPU_DAY_PARTS a pattern of the parts that run (all),
# TIMM_SDIST the archive of timm's source distribution, whose tests are left out without it. FOLDER gets log.txt,
# parts.csv (each part's exit status and seconds) and benchmarks.csv. The exit status is 1 if a part failed or had no time.
set -uo pipefail

out=${1:?usage: bash examples/gpu_day.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
exec > >(tee "$out/log.txt") 2>&1

dry=${GPU_DAY_DRY:-}
seconds=${GPU_DAY_SECONDS:-560}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export RAT_TIMM_TEST_DEVICE=cuda TORCH_DEVICE=cuda
pick='' workers=8 times=1
if [ -n "$dry" ]; then
  times=4  # a CPU has other work too
  export RAT_TIMM_TEST_DEVICE=cpu TORCH_DEVICE=cpu OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1
  pick='follows_its_definition and not (flex or natten) or physical_stem' workers=0
fi
failed=0
echo part,status,seconds > "$out/parts.csv"

# part NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds, less where less is left of all
part() {
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  [[ $name =~ ${GPU_DAY_PARTS:-.} ]] || return 0
  limit=$((limit * times))
  limit=$((seconds - SECONDS < limit ? seconds - SECONDS : limit))
  echo "== $SECONDS s: $name (at most $limit s)"
  if [ "$limit" -lt 10 ]; then
    status="no time"
  else
    timeout --kill-after=5 "$limit" "$@"
    status=$?
  fi
  [ "$status" = 0 ] || failed=1
  echo "== $SECONDS s: $name ended with $status after $((SECONDS - started)) s"
  echo "$name,$status,$((SECONDS - started))" >> "$out/parts.csv"
}

benchmark() { part "$1" "$2" python3 examples/benchmark.py "${@:3}" --csv "$out/benchmarks.csv"; }

gpu=(--device cuda --dtype bfloat16 --memory)
peers=(swin_tiny_patch4_window7_224 hiera_tiny_224 convnext_tiny)
small=(--models rat_tiny --peers "${peers[@]}" --batch 64)
plain=(rat_vit_base_patch16_rope_mixed_224 --peers vit_base_patch16_rope_mixed_224 vit_base_patch16_224 --batch 64)
volumes=(--models rat_tiny_3d --peers monai_swin_vit --size 96 --batch 4 --features)

# warm: compiles what is measured compiled, several at a time, into the caches of PyTorch's compiler
warm() {
  local once=(--device cuda --dtype bfloat16 --compile --runs 1 --steps 1)
  {
    timeout 170 python3 examples/benchmark.py --models rat_tiny --batch 64 --mode train "${once[@]}" &
    timeout 170 python3 examples/benchmark.py --models rat_tiny --batch 64 "${once[@]}" &
    timeout 170 python3 examples/benchmark.py --models "${peers[@]}" --batch 64 --mode train "${once[@]}" &
    timeout 170 python3 examples/benchmark.py --models "${peers[@]}" --batch 64 "${once[@]}" &
    timeout 170 python3 examples/benchmark.py --models "${plain[@]}" "${once[@]}" &
    timeout 170 python3 examples/benchmark.py "${volumes[@]}" --mode train "${once[@]}" &
    wait
  } > "$out/compilers.txt" 2>&1
}

part packages 60 python3 - <<'PYTHON'
import importlib.metadata as metadata
import os
import sys

wanted = ["torch", "torchvision", "timm", "numpy", "huggingface_hub", "safetensors", "rich", "pytest", "hypothesis"]
wanted += ["rotary-spatial-embeddings", "spatial-grouping-attention"]
useful = ["pytest-xdist", "triton", "monai", "natten"]
versions = {}
for name in wanted + useful:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        versions[name] = "missing"
print(f"python {sys.version.split()[0]}", *(f"{name} {version}" for name, version in versions.items()), sep=", ")
missing = [name for name in wanted if versions[name] == "missing"]
if missing:
    sys.exit(f"missing: {', '.join(missing)}")
import torch

if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    print(f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, CUDA {torch.version.cuda}")
elif os.environ["RAT_TIMM_TEST_DEVICE"] == "cuda":
    sys.exit("no GPU that PyTorch can use")
import timm

import rat_timm

print(rat_timm.__file__, timm.__file__)
if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
    sys.exit(f"timm is older than 1.0.31: {timm.__version__}")
PYTHON
[ "$failed" = 0 ] || exit 1

warm_process=''
# compilers work on the CPU while tests run; what they made is read when it is measured
if [ -z "$dry" ]; then warm & warm_process=$!; fi
pytest=(python3 -m pytest -q -p no:cacheprovider --tb=short --show-capture=no -rfE --durations=10)
if python3 -c 'import xdist' 2> /dev/null; then pytest+=(-n "$workers"); else echo "pytest-xdist is missing: one process"; fi
export TORCHINDUCTOR_COMPILE_THREADS=4
part "layers and models" 150 "${pytest[@]}" tests/test_cuda.py ${pick:+-k "$pick"}

if [ -n "${TIMM_SDIST:-}" ]; then
  part "timm's tests" 60 python3 tests/run_timm_tests.py test_rat test_rat_3d rat_vit_small_patch16_rope_mixed_224 \
    -- "${pytest[@]:6}"
else
  echo "TIMM_SDIST is not set: timm's own tests are left out"
fi

if [ -n "$dry" ]; then
  tiny=(--batch 1 --runs 1 --size 32 --dtype bfloat16)
  benchmark inference 60 --models test_rat --peers test_rat+conv "${tiny[@]}"
  benchmark "compiled training" 60 --models test_rat_3d --mode train --compile --features "${tiny[@]}"
  exit "$failed"
fi

echo "== $SECONDS s: waiting for the compilers"
wait "$warm_process"
unset TORCHINDUCTOR_COMPILE_THREADS
echo "== $SECONDS s: the compilers have ended"
python3 -c 'import monai' 2> /dev/null || echo "monai is missing: its network is recorded as an error"
# flex is compiled for each size, also in eager models
benchmark "inference" 60 "${small[@]}" --models rat_tiny rat_tiny@flex rat_tiny+conv rat_base "${gpu[@]}" --runs 5
benchmark "training" 70 "${small[@]}" --models rat_tiny rat_tiny@flex rat_base --mode train "${gpu[@]}" --runs 3
benchmark "compiled inference" 90 "${small[@]}" "${gpu[@]}" --compile --runs 3
benchmark "compiled training" 120 "${small[@]}" --mode train "${gpu[@]}" --compile --runs 3
benchmark "volumes inference" 30 "${volumes[@]}" "${gpu[@]}" --runs 3
benchmark "volumes training" 30 "${volumes[@]}" --mode train "${gpu[@]}" --runs 3
benchmark "plain inference" 30 --models "${plain[@]}" "${gpu[@]}" --runs 3
benchmark "plain training" 30 --models "${plain[@]}" --mode train "${gpu[@]}" --runs 3
benchmark "operations" 40 --operations --batch 64 --device cuda --dtype bfloat16 --runs 5
benchmark "operations training" 40 --operations --batch 64 --device cuda --dtype bfloat16 --runs 5 --mode train
benchmark "plain compiled inference" 60 --models "${plain[@]}" "${gpu[@]}" --compile --runs 3
benchmark "volumes compiled training" 90 "${volumes[@]}" --mode train "${gpu[@]}" --compile --runs 3
benchmark "one image with CUDA graphs" 90 --models rat_tiny --peers swin_tiny_patch4_window7_224 --batch 1 \
  --device cuda --dtype bfloat16 --compile reduce-overhead --runs 5
exit "$failed"
