#!/usr/bin/env bash
# Builds the matrix products of llama.cpp (ggml) and ik_llama.cpp, with each compiler given, for linear_cpu.py:
#     ggml.sh DIRECTORY [g++ clang++-19 ...]
# DIRECTORY/bin/{ggml,ik}-COMPILER are the drivers (ggml.cpp says what they answer). Sources are cloned, at the commits
# below, into DIRECTORY/source, from elsewhere if GGML_URL or IK_URL says so; a tree that is there is left as it is.
# clang needs its OpenMP (Debian: clang-19 libomp-19-dev): without it ggml would use another thread pool, and says so.
set -euo pipefail
if [[ $# == 0 || $1 == -* ]]; then
  sed -n '2,3s/^# *//p' "$0" >&2
  exit 2
fi
here=$(dirname "$(realpath "$0")")
mkdir -p "$1"/{source,build,bin}
directory=$(realpath "$1")
shift
[[ $# -gt 0 ]] || set -- g++

get() {  # NAME URL COMMIT PATH...: only what the library needs
  local tree=$directory/source/$1
  if [[ ! -d $tree ]]; then
    git clone --quiet --filter=blob:none --no-checkout "$2" "$tree"
    git -C "$tree" sparse-checkout set --no-cone "${@:4}"
    git -C "$tree" checkout --quiet "$3"
  fi
}
get ggml "${GGML_URL:-https://github.com/ggml-org/ggml}" d99724f2b141fed9e1a9f402213506c081433465 \
  /CMakeLists.txt /ggml.pc.in /cmake /include /src
get ik "${IK_URL:-https://github.com/ikawrakow/ik_llama.cpp}" 8337e4cd3861406fc04e0854b1409cd1b027fbc9 /ggml

for cxx in "$@"; do
  cc=${cxx/clang++/clang}
  cc=${cc/g++/gcc}
  for library in ggml ik; do
    tree=$directory/source/$library
    options=()
    if [[ $library == ik ]]; then  # attention is no matrix product of a linear, and takes most of an hour to compile
      options=(-DTREE="$tree/ggml" -DIK=ON -DGGML_IQK_FLASH_ATTENTION=OFF -DGGML_IQK_FA_ALL_QUANTS=OFF)
    else
      options=(-DTREE="$tree")
    fi
    build=$directory/build/$library-$cxx
    about="$library $(git -C "$tree" describe --always --dirty --abbrev=12) $("$cxx" --version | head -n1)"
    {
      cmake -S "$here" -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" \
        -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DABOUT="$about" "${options[@]}" &&
        cmake --build "$build" --target driver --parallel "$(nproc)"
    } > "$build.log" 2>&1 || { tail -n 20 "$build.log" >&2 && exit 1; }
    cp "$build/driver" "$directory/bin/$library-$cxx"
    echo "$directory/bin/$library-$cxx: $about"
  done
done
