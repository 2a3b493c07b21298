#!/usr/bin/env bash
# The first day of a GPU: three calls of less than ten minutes each, on one GPU of 80 GB or more.
#   OUT=FOLDER benchmarks/gpu_day.sh 1|2|3 [--tiny]
# 1: does it compute what a CPU computes?  2: the tokenizer's step, memory, checkpoints.  3: the 7 B, encoding, serving.
# Needs the packages alone: data and weights are made on the spot. A measurement that fails or takes too long is said so
# and the next one begins; then the exit code is 1. --tiny runs the same at toy size on a CPU, as a test.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
call=${1-} size=${2-} python=${PYTHON:-python}
if [[ ! $call =~ ^[123]$ || ( -n $size && $size != --tiny ) ]]; then
  echo "usage: OUT=FOLDER benchmarks/gpu_day.sh 1|2|3 [--tiny]" >&2
  exit 2
fi
out=${OUT:-gpu_day}
mkdir -p "$out" || exit 2
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} COLUMNS=140 PYTHONUNBUFFERED=1
tiny() { [[ $size == --tiny ]]; }
tiny && option=(--tiny) || option=()
tiny && export OMP_NUM_THREADS=1
summary=$out/call$call.txt failed=0
CALL=580 # seconds of a call, of which each process's import of torch is a part
: > "$summary"

# measure NAME SECONDS COMMAND…: what it prints is in $OUT/callN-NAME.txt, its figures in the summary.
# No measurement has more than what is left of the call, so the one that may take longest comes last.
measure() {
  local name=$1 limit=$2 began=$SECONDS code said
  shift 2
  said=$out/call$call-$name.txt
  if tiny; then
    limit=$((5 * limit))  # a CPU that others use, too
  else
    limit=$((SECONDS + limit < CALL ? limit : CALL - SECONDS))
    ((limit > 0)) || limit=1
  fi
  timeout -k 10 "$limit" "$@" > "$said" 2>&1
  code=$?
  if ((code == 0)); then
    echo "ok      $name, $((SECONDS - began)) s"
  else
    failed=1
    ((code == 124 || code == 137)) && why="took more than $limit s" || why="exit code $code"
    echo "FAILED  $name, $((SECONDS - began)) s: $why; the end of $said:"
    tail -n 5 "$said" | sed 's/^/        | /'
  fi
  grep '^»' "$said" | sed 's/^/        /'
} > >(tee -a "$summary")

"$python" -c 'import torch; g = torch.cuda.is_available(); print(torch.__version__, torch.cuda.get_device_name() if g else "no GPU")' |
  tee -a "$summary"
if [[ $call != 1 ]]; then
  "$python" benchmarks/_toy.py "$scratch/toy" "${option[@]}" > "$out/call$call-toy.txt" 2>&1 || failed=1
fi
toy=$scratch/toy/toy.yaml

case $call in
  1)
    measure correctness 450 "$python" benchmarks/gpu_correctness.py "${option[@]}"
    measure doctor 120 "$python" -m stamo_dist.cli doctor --set run_dir="$scratch/doctor"
    ;;
  2)
    tiny && some=(--batch 4 --repeats 2) || some=(--batch 48)
    measure tokenizer 230 "$python" benchmarks/step.py full "${some[@]}" "${option[@]}"
    tiny && steps=8 || steps=60
    measure overhead 120 "$python" benchmarks/step.py overhead "$toy" --steps $steps
    tiny && some=(zero2 fsdp) || some=(ddp zero2 zero3 fsdp)
    # Eager: zero3 is refused with train.compile, and four compilations would take the time of the rest.
    measure memory 130 "$python" benchmarks/plan_memory.py "$toy" --processes 1 --strategies "${some[@]}" \
      --set train.compile=false
    tiny && some=(--millions 13 --saves 1) || some=(--millions 300)
    measure checkpoint 100 "$python" benchmarks/checkpoint.py "${some[@]}"
    ;;
  3)
    tiny && some=(--batch 4 --repeats 2) || some=(--batch 16)
    measure policy 150 "$python" benchmarks/step.py policy "${some[@]}" "${option[@]}"
    measure lora 150 "$python" benchmarks/step.py policy --lora 32 "${some[@]}" "${option[@]}"
    tiny && some=(--calls 3) || some=()
    measure serve 90 "$python" benchmarks/serve.py "$scratch/toy/policy.yaml" "${some[@]}"
    measure decode 60 "$python" benchmarks/decode_to_gpu.py "${option[@]}"
    tiny && some=(--frames 64) || some=(--frames 1536 --turns 1 --compile --arithmetic fp32 bf16)
    measure encode 200 "$python" benchmarks/encode.py "${some[@]}" "${option[@]}"
    ;;
esac
wait
exit $failed
