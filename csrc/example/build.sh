#!/usr/bin/env bash
# Compiles the kernels, main.cpp and encode.cpp without Python, torch or CMake, all files in parallel:
#   csrc/example/build.sh FOLDER && FOLDER/example
#   FOLDER/encode FILE < IDS
# CXX and CXXFLAGS are obeyed. With nvcc on the PATH, the GPU kernels are compiled for CUDA_ARCH (default
# 80) and later GPUs; an empty CUDA_ARCH leaves them out.
set -eo pipefail
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
read -ra flags <<<"${CXXFLAGS:-}"
read -ra cxx <<<"${CXX:-c++}"
cxx+=(-O3 -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi "${flags[@]}")
link=("${cxx[@]}") objects=() pids=()
arch=${CUDA_ARCH-80}
type nvcc &>/dev/null || arch=""

compile() { # OBJECT COMMAND...
  "${@:2}" -I. -c -o "$out/$1.o" &
  pids+=($!)
}
kernels() { # OBJECT COMMAND...
  objects+=("$out/$1.o")
  compile "$@"
}
cpu_kernels() { # ISA FLAGS...
  for type in float double; do
    for part in kernels many encoder; do
      kernels "$1_${type}_$part" "${cxx[@]}" "-DKRON_ISA=$1" "-DKRON_TYPE=$type" "${@:2}" "cpu/$part.cpp"
    done
  done
}

cpu_kernels portable
has_x86=()
case $("${cxx[0]}" -dumpmachine) in
x86_64* | amd64*)
  has_x86=(-DKRON_HAS_X86)
  cpu_kernels avx2 -mavx2 -mfma
  cpu_kernels avx512 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl
  ;;
esac
kernels cpu "${cxx[@]}" "${has_x86[@]}" cpu/cpu.cpp

compile encode "${cxx[@]}" example/encode.cpp
if [ -z "$arch" ]; then
  compile main "${cxx[@]}" example/main.cpp
else
  link=(nvcc -ccbin "${cxx[0]}") # with CUDA's runtime, statically
  nvcc=("${link[@]}" -O3 -std=c++17 "-gencode=arch=compute_$arch,code=[sm_$arch,compute_$arch]")
  for math in float16 bfloat16 tf32 float32; do
    kernels "$math" "${nvcc[@]}" "-DKRON_MATH=$math" cuda/kernels.cu
  done
  for source in cuda/*.cpp; do
    kernels "$(basename "$source" .cpp)" "${nvcc[@]}" "$source"
  done
  compile main "${nvcc[@]}" -DWITH_CUDA example/main.cpp
fi

for pid in "${pids[@]}"; do wait "$pid"; done
"${link[@]}" "${objects[@]}" "$out/main.o" -o "$out/example"
"${link[@]}" "${objects[@]}" "$out/encode.o" -lpthread -o "$out/encode"
