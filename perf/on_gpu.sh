#!/usr/bin/env bash
# Everything that a GPU can tell of this repository, in calls of nine minutes: correctness first, then speed.
#
#   perf/on_gpu.sh                      every part, in order, as far as the time goes
#   perf/on_gpu.sh --part bench         one part; several with several --part
#   perf/on_gpu.sh --list               the steps, their limits and estimates; runs nothing
#
#   --out DIR       where on-gpu.json, on-gpu.log, counters.csv and device.json go (default: $OUT, else perf/results/<device>)
#   --seconds N     for all steps together (default: 540)
#   --again         run the chosen steps even if they are recorded as done
#
# Parts: correctness, bench, overhead, counters, peers, tune. A step has its own limit, and one that fails does not stop
# the next. What is done is recorded in build/on-gpu: the same command goes on where the last one stopped, with what ran
# out of time or was not begun. A failed step is done too. Needs Python with torch, nvcc, and for some steps ncu and
# compute-sanitizer; .gpu/setup.sh is sourced first where it exists. PYTHON chooses the interpreter. Leaves the clocks
# and all other settings of the GPU as they are.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# name part limit estimate command: seconds, and a line for `bash -c`. The estimates are for an H200 with 16 cores, of
# builds from their times on a CPU (building.SECONDS); no step has run on a GPU yet.
steps() {
  cat <<'STEPS'
machine             correctness  30   4   nvidia-smi && nvcc --version | tail -1 && $MHC doctor
compile-small       correctness  90  35   $ON_GPU compile smoke
smoke               correctness  40  15   $ON_GPU launch --device cuda
memcheck            correctness  90  40   PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 $ON_GPU launch --device cuda
racecheck           correctness  90  50   compute-sanitizer --tool racecheck --error-exitcode 9 $ON_GPU launch --device cuda
compile-correctness correctness 300 200   $ON_GPU compile correctness
check               correctness 120  60   $MHC check --device cuda --json $JSON
tests               correctness 150  90   $PYTHON -m pytest -m gpu -n 4 -q $(grep -l mark.gpu -r tests --include="test_*.py")
compile-bench       bench       200 140   $ON_GPU compile bench
bench               bench       150 100   $MHC bench --device cuda --tokens 4096 --json $JSON
bench-16384         bench        90  50   $MHC bench --device cuda --tokens 16384 --widths 2560 --json $JSON
bench-decode        bench        60  30   $MHC bench --device cuda --tokens 1 8 64 --widths 2560 --kernels aggregate post post_pre --json $JSON
compile-overhead    overhead    200  15   $ON_GPU compile overhead
overhead-3b         overhead     60  30   $MHC bench overhead --device cuda --model 3b --json $JSON
overhead-9b         overhead     60  30   $MHC bench overhead --device cuda --model 9b --json $JSON
overhead-27b        overhead     60  30   $MHC bench overhead --device cuda --model 27b --json $JSON
overhead-v4-flash   overhead     70  40   $MHC bench overhead --device cuda --model v4-flash --json $JSON
overhead-v4-pro     overhead     80  50   $MHC bench overhead --device cuda --model v4-pro --json $JSON
constants           counters    120  90   $PYTHON -m mhc_tilelang.perf.gpu.constants --out $CONSTANTS
compile-counters    counters     60  10   $ON_GPU compile counters
counters            counters    150  80   $PYTHON -m mhc_tilelang.perf.gpu.counters --csv $COUNTERS --json $JSON
compile-peers       peers       200  10   $ON_GPU compile peers
peers-warm          peers       180 120   for k in project+coefficients+aggregate coefficients sinkhorn aggregate post sinkhorn_backward aggregate_backward post_backward project_backward; do $MHC bench --device cuda --kernels $k --widths 2560 --tokens 4096 --peers all --repeats 1 & done; wait
peers               peers       120  60   $MHC bench --device cuda --widths 2560 --tokens 4096 --peers all --json $JSON
compiled            peers       150 100   $MHC bench --device cuda --widths 2560 --tokens 4096 --baselines all --json $JSON
tune-post_project   tune        120  80   $TUNE post_project --json $JSON
tune-boundary       tune        120  90   $TUNE boundary_backward --json $JSON
tune-post_backward  tune         60  25   $TUNE post_backward aggregate_backward --json $JSON
tune-apply          tune         90  60   $TUNE post aggregate expand expand_backward --json $JSON
tune-project        tune        120  80   $TUNE project project_backward --json $JSON
tune-tokens         tune         90  50   $TUNE coefficients coefficients_backward sinkhorn sinkhorn_backward --json $JSON
STEPS
}

fail() {
  echo "on_gpu.sh: $1" >&2
  exit 2
}

parts=() list= again= seconds=540 out=${OUT:-}
while [ $# -gt 0 ]; do
  case $1 in
    --part | --out | --seconds) [ $# -gt 1 ] || fail "$1: expected a value" ;;&
    --part) parts+=("$2") && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    --seconds) seconds=$2 && shift 2 ;;
    --list) list=1 && shift ;;
    --again) again=1 && shift ;;
    *) fail "unknown option $1; see the head of perf/on_gpu.sh" ;;
  esac
done
known=$(steps | awk '{print $2}' | sort -u)
for part in "${parts[@]}"; do
  grep -qx -- "$part" <<<"$known" || fail "--part: expected one of $(echo $known), got $part"
done
[[ $seconds =~ ^[0-9]+$ ]] || fail "--seconds: expected a number, got $seconds"

chosen() {
  steps | while read -r name part rest; do
    if [ ${#parts[@]} -eq 0 ] || printf '%s\n' "${parts[@]}" | grep -qx "$part"; then echo "$name $part $rest"; fi
  done
}

if [ -n "$list" ]; then
  chosen | awk 'BEGIN { printf "%-20s %-12s %6s %9s\n", "step", "part", "limit", "estimate" }
                { printf "%-20s %-12s %6d %9d\n", $1, $2, $3, $4; sum += $4 }
                END { printf "%-20s %-12s %6s %9d\n", "", "", "", sum }'
  exit 0
fi

began=$SECONDS
# shellcheck source=/dev/null
[ ! -f .gpu/setup.sh ] || . .gpu/setup.sh
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
export PYTHON PYTHONUNBUFFERED=1
work=build/on-gpu
mkdir -p "$work"
if [ -z "$out" ]; then
  device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z-')
  out=perf/results/${device:-gpu}
fi
mkdir -p "$out" || fail "--out: cannot make $out"
export MHC="$PYTHON -m mhc_tilelang.cli" ON_GPU="$PYTHON -m mhc_tilelang.perf.gpu.run"
export TUNE="$PYTHON -m mhc_tilelang.perf.gpu.tune --device cuda" COUNTERS="$out/counters.csv"
export CONSTANTS="$out/device.json" # for mhc-tilelang predict --gpu

# A step's record is one line: status, seconds, limit.
while read -r name part limit estimate command; do
  record=$work/$name.step
  [ -z "$again" ] || rm -f "$record"
  if grep -qsE '^(ok|failed) ' "$record"; then
    echo "$name: done before"
    continue
  fi
  left=$((seconds - (SECONDS - began)))
  if [ "$left" -lt $(((estimate + 1) / 2)) ]; then
    echo "left 0 $limit" >"$record"
    : >"$work/$name.log"
    echo "$name: left for the next call"
    continue
  fi
  given=$((left < limit ? left : limit))
  export JSON=$work/$name.json
  rm -f "$JSON"
  start=$SECONDS
  timeout -k 5 "$given" bash -c "$command" >"$work/$name.log" 2>&1 </dev/null
  case $? in
    0) status=ok ;;
    124 | 137) status=timeout ;;
    *) status=failed ;;
  esac
  echo "$status $((SECONDS - start)) $given" >"$record"
  echo "$name: $status after $((SECONDS - start)) s of $given, $((SECONDS - began)) s in all"
  [ $status = ok ] || tail -n 6 "$work/$name.log" | cut -c1-300
  $ON_GPU collect "$work" "$out" # after every step: a call can be stopped at any time
done < <(chosen)

$ON_GPU collect "$work" "$out" --table
