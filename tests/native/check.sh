#!/usr/bin/env bash
# Builds the kernels with check.cpp, check_int8.cpp, check_bfloat16.cpp and check_encoder.cpp in a temporary folder
# and runs them.
# CXX is obeyed.
#   tests/native/check.sh [plain] [asan] [tsan] [arm64]      all of them without an argument
set -euo pipefail
cd "$(dirname "$0")/../../csrc"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
read -ra host <<<"${CXX:-c++}"

avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
kernels="-Wno-psabi -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti -ffp-contract=fast"

# Whether this machine has an instruction set; yes if it does not say.
has() { [ ! -r /proc/cpuinfo ] || grep -qw "$1" /proc/cpuinfo; }

# Flags for sets that have no instruction for bytes, or for bfloat16, here: they run its code in portable C++.
emulate=-DKRON_EMULATE_BYTES halves=-DKRON_EMULATE_BFLOAT16
emulate_avx2="$(grep -qsw avx_vnni /proc/cpuinfo || echo $emulate) $halves"
emulate_avx512="$(grep -qsw avx512_vnni /proc/cpuinfo || echo $emulate) $(grep -qsw avx512_bf16 /proc/cpuinfo || echo $halves)"

# build STAGE "FLAGS" "FLAGS OF THE CHECKS" COMPILER...: all instruction sets (for TSan one: they share
# the code that divides work), compiled in parallel. Those that this machine lacks are only linked.
build() {
  local out=$folder/$1 stage=$1 flags=$2 check=$3 cpu="" wide=$2 widest=$2
  shift 3
  has avx2 || wide=-O0
  has avx512vl || widest=-O0
  mkdir -p "$out/kernels"
  # Under ASan the baseline set has the tiles of machines with 32 registers.
  local tiles="" baseline="$emulate $halves" name
  # On ARM the baseline has the instruction for bytes.
  case $("$@" -dumpmachine) in aarch64*) baseline=$halves ;; esac
  [ "$stage" != asan ] || tiles=-DKRON_ACCUMULATORS=24
  {
    case $stage/$("$@" -dumpmachine) in
    tsan/*) ;;
    */x86_64* | */amd64*)
      cpu=-DKRON_HAS_X86
      for part in kernels many encoder; do
        for type in float double; do
          echo "$widest $kernels -DKRON_ISA=avx512 -DKRON_TYPE=$type $avx512 $emulate_avx512 -c cpu/$part.cpp" \
            "-o $out/kernels/avx512_${type}_$part.o"
          echo "$wide $kernels -DKRON_ISA=avx2 -DKRON_TYPE=$type -mavx2 -mfma $emulate_avx2 -c cpu/$part.cpp" \
            "-o $out/kernels/avx2_${type}_$part.o"
        done
      done
      ;;
    esac
    for part in kernels many encoder; do
      for type in float double; do
        echo "$flags $kernels $tiles $baseline -DKRON_ISA=portable -DKRON_TYPE=$type -c cpu/$part.cpp" \
          "-o $out/kernels/portable_${type}_$part.o"
      done
    done
    for name in check check_int8 check_encoder; do
      echo "$check -Wall -Wextra -I. -c ../tests/native/$name.cpp -o $out/$name.o"
    done
    echo "$flags $kernels $halves -Wno-unused-function -c ../tests/native/check_bfloat16.cpp -o $out/check_bfloat16.o"
    echo "$flags $kernels $cpu $baseline -c cpu/cpu.cpp -o $out/kernels/cpu.o"
  } | sed "s/^/-std=c++17 /" | xargs -P "$(getconf _NPROCESSORS_ONLN)" -L 1 "$@"
  # shellcheck disable=SC2086
  "$@" $flags "$out/check_bfloat16.o" -o "$out/check_bfloat16"
  # The others count the kernels' allocations.
  local wrap=-Wl,--wrap=malloc,--wrap=calloc,--wrap=aligned_alloc
  # shellcheck disable=SC2086
  "$@" $flags "$out"/kernels/*.o "$out/check.o" -pthread -o "$out/check"
  for name in check_int8 check_encoder; do
    # shellcheck disable=SC2086
    "$@" $flags "$out"/kernels/*.o "$out/$name.o" $wrap -pthread -o "$out/$name"
  done
}

plain() {
  build plain "-O2" "-O2" "${host[@]}"
  "$folder/plain/check" --self-test
  "$folder/plain/check_int8" --self-test
  "$folder/plain/check_encoder" --self-test
  # glibc fills fresh memory with huge numbers, which show if they are read before they are written.
  "$folder/plain/check_bfloat16"
  MALLOC_PERTURB_=128 "$folder/plain/check"
  MALLOC_PERTURB_=128 "$folder/plain/check_int8"
  MALLOC_PERTURB_=128 "$folder/plain/check_encoder"
}
asan() {
  # -O1 would take twice as long to compile, and UBSan in check.cpp twice as long to run.
  build asan "-Og -fsanitize=address,undefined -fno-sanitize-recover=all" "-O1 -fsanitize=address" \
    "${host[@]}"
  export ASAN_OPTIONS=max_malloc_fill_size=1000000000:malloc_fill_byte=255
  "$folder/asan/check_bfloat16"
  "$folder/asan/check_encoder" --every 9 --draws 6 --work 2e5 &
  "$folder/asan/check" --every 31 --draws 4 --work 2e4
  "$folder/asan/check_int8" --every 19 --draws 6 --work 2e4
  wait $!
}
tsan() {
  build tsan "-O1 -fsanitize=thread" "-O1 -fsanitize=thread" "${host[@]}"
  "$folder/tsan/check" --every 19 --draws 0 --work 1e5
  "$folder/tsan/check_int8" --every 29 --draws 0 --work 1e5
  "$folder/tsan/check_encoder" --every 7 --draws 3 --work 1e5
}
arm64() {
  if ! type aarch64-linux-gnu-g++ qemu-aarch64-static &>/dev/null; then
    echo "skipped: there is no aarch64-linux-gnu-g++ or no qemu-aarch64-static"
    return
  fi
  build arm64 "-O2 -static" "-O2" aarch64-linux-gnu-g++
  qemu-aarch64-static "$folder/arm64/check" --every 3 --draws 20 --work 1e4
  qemu-aarch64-static "$folder/arm64/check_int8" --every 3 --draws 20 --work 1e5
  qemu-aarch64-static "$folder/arm64/check_encoder" --every 5 --draws 5 --work 1e5
}

[ $# -gt 0 ] || set -- plain asan tsan arm64
for stage in "$@"; do
  [[ " plain asan tsan arm64 " == *" $stage "* ]] || { echo "no such stage: $stage" && exit 2; }
  echo "== $stage"
  start=$SECONDS
  "$stage"
  echo "   $((SECONDS - start)) s"
done
