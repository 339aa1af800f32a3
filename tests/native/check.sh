#!/usr/bin/env bash
# Builds the kernels with check.cpp, in a temporary folder, and runs it; CXX is obeyed.
#   csrc/check.sh [plain] [asan] [tsan] [arm64]      all of them without an argument
set -euo pipefail
cd "$(dirname "$0")/../../csrc"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
read -ra host <<<"${CXX:-c++}"

x86=("avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma" "avx2 -mavx2 -mfma")
kernels="-Wno-psabi -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti -ffp-contract=fast"

# build STAGE "FLAGS" COMPILER...: every instruction set (with TSan one, since they share the code
# that divides work), two compilations at a time.
build() {
  local out=$folder/$1 stage=$1 flags=$2 units=("portable ") cpu="" unit
  shift 2
  case $stage/$("$@" -dumpmachine) in
  tsan/*) ;;
  */x86_64* | */amd64*) units=("${x86[@]}" "portable ") cpu=-DKRON_HAS_X86 ;;
  esac
  mkdir "$out"
  {
    for unit in "${units[@]}"; do
      echo "$kernels -DKRON_ISA=$unit -c cpu/kernels.cpp -o $out/${unit%% *}.o"
    done
    echo "-Wall -Wextra -I. -c ../tests/native/check.cpp -o $out/check.o"
    echo "$kernels $cpu -c cpu/cpu.cpp -o $out/cpu.o"
  } | sed "s/^/-std=c++17 $flags /" | xargs -P 2 -L 1 "$@"
  # shellcheck disable=SC2086
  "$@" $flags "$out"/*.o -pthread -o "$out/check"
}

plain() {
  build plain "-O2" "${host[@]}"
  "$folder/plain/check" --self-test
  # glibc fills fresh memory with huge numbers, so that one read before it is written shows.
  MALLOC_PERTURB_=128 "$folder/plain/check" 
}
asan() {
  build asan "-Og -fsanitize=address,undefined -fno-sanitize-recover=all" "${host[@]}"
  ASAN_OPTIONS=max_malloc_fill_size=1000000000:malloc_fill_byte=255 \
    "$folder/asan/check" --every 3 --draws 10 --work 1e5
}
tsan() {
  build tsan "-O1 -fsanitize=thread" "${host[@]}"
  "$folder/tsan/check" --every 19 --draws 0 --work 1e5
}
arm64() {
  if ! type aarch64-linux-gnu-g++ qemu-aarch64-static &>/dev/null; then
    echo "skipped: there is no aarch64-linux-gnu-g++ or no qemu-aarch64-static"
    return
  fi
  build arm64 "-O2 -static" aarch64-linux-gnu-g++
  qemu-aarch64-static "$folder/arm64/check" --every 3 --draws 20 --work 1e4
}

[ $# -gt 0 ] || set -- plain asan tsan arm64
for stage in "$@"; do
  [[ " plain asan tsan arm64 " == *" $stage "* ]] || { echo "no such stage: $stage" && exit 2; }
  echo "== $stage"
  start=$SECONDS
  "$stage"
  echo "   $((SECONDS - start)) s"
done
