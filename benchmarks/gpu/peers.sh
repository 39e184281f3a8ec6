#!/usr/bin/env bash
# Fetches the projects that peers.py measures beside awq_ext, at the commits that it was written for:
#     peers.sh DIRECTORY
# Nothing is built here: run_all.py --peers DIRECTORY does that where the GPU is, which may be without a network.
set -euo pipefail
if [[ $# != 1 ]]; then
  sed -n '3s/^# *//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
fetch() {  # NAME OWNER COMMIT PATHS..
  local name=$1 owner=$2 commit=$3
  shift 3
  git init -q "$directory/$name"
  git -C "$directory/$name" sparse-checkout set --no-cone "$@"
  git -C "$directory/$name" fetch -q --depth 1 "${AWQ_PEERS_FROM:-https://github.com}/$owner/$name" "$commit"
  git -C "$directory/$name" checkout -q FETCH_HEAD
}
directory=$1
fetch marlin IST-DASLab 2f6d7c10e124b3c5fa29ff8d77d568bd7af3274c /marlin
fetch AutoAWQ_kernels casper-hansen c7b0e88c327694c715b0a758d9ce8fd414a1fa21 /awq_ext
fetch GPTQModel ModelCloud f4c327a17eb3e24524d5a97a3d682e3696ae6a28 /gptqmodel_ext/marlin \
  /gptqmodel/utils/marlin_scalar_type.py
