#!/usr/bin/env bash
# A virtual environment for one of the peers, whose pins contradict one another's:
#     install.sh autoawq|gptqmodel|llmcompressor|autoround DIRECTORY
set -euo pipefail
if [[ $# != 2 || ! $1 =~ ^(autoawq|gptqmodel|llmcompressor|autoround)$ ]]; then
  sed -n '3s/^# *//p' "$0" >&2
  exit 2
fi
peer=$1
venv=$2
torch=torch==2.13.0
python3 -m venv "$venv"
pins=$venv/pins.txt
echo "$torch" > "$pins"
pip=("$venv/bin/python" -m pip install -q)
"${pip[@]}" "$torch" setuptools wheel
case $peer in
  autoawq)
    # It is archived; 4.51.3 is the last transformers that its author tested.
    "${pip[@]}" -c "$pins" transformers==4.51.3 accelerate datasets zstandard
    "${pip[@]}" --no-deps autoawq==0.2.9
    ;;
  gptqmodel) BUILD_CUDA_EXT=0 "${pip[@]}" -c "$pins" --no-build-isolation gptqmodel==7.6.0 ;;
  llmcompressor) "${pip[@]}" -c "$pins" llmcompressor==0.14.0.1 ;;
  autoround) "${pip[@]}" -c "$pins" auto-round==0.16.1 ;;
esac
