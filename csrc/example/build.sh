#!/usr/bin/env bash
# Compiles the kernels and main.cpp without Python, torch or CMake, all files in parallel:
#   csrc/example/build.sh FOLDER && FOLDER/example
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
  objects+=("$out/$1.o")
  "${@:2}" -I. -c -o "$out/$1.o" &
  pids+=($!)
}

compile_cpu() { # ISA FLAGS...
  compile "$1_kernels" "${cxx[@]}" "-DKRON_ISA=$1" "${@:2}" cpu/kernels.cpp
  compile "$1_encoder" "${cxx[@]}" "-DKRON_ISA=$1" "${@:2}" cpu/encoder.cpp
}

compile_cpu portable
has_x86=()
case $("${cxx[0]}" -dumpmachine) in
x86_64* | amd64*)
  has_x86=(-DKRON_HAS_X86)
  compile_cpu avx2 -mavx2 -mfma
  compile_cpu avx512 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl
  ;;
esac
compile cpu "${cxx[@]}" "${has_x86[@]}" cpu/cpu.cpp

if [ -z "$arch" ]; then
  compile main "${cxx[@]}" example/main.cpp
else
  link=(nvcc -ccbin "${cxx[0]}") # with CUDA's runtime, statically
  nvcc=("${link[@]}" -O3 -std=c++17 "-gencode=arch=compute_$arch,code=[sm_$arch,compute_$arch]")
  for math in float16 bfloat16 tf32 float32; do
    compile "$math" "${nvcc[@]}" "-DKRON_MATH=$math" cuda/kernels.cu
  done
  for source in cuda/*.cpp; do
    compile "$(basename "$source" .cpp)" "${nvcc[@]}" "$source"
  done
  compile main "${nvcc[@]}" -DWITH_CUDA example/main.cpp
fi

for pid in "${pids[@]}"; do wait "$pid"; done
"${link[@]}" "${objects[@]}" -o "$out/example"
