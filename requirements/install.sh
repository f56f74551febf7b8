#!/usr/bin/env bash
# Installs the locked packages into the virtual environment $1 and this repository into it, editable.
#
# torch is chosen by TORCH (default: auto):
#   auto  a machine with an NVIDIA GPU (nvidia-smi lists one) takes cuda; any other takes cpu
#   cpu   a CPU wheel at hand (pip's find-links), else PyTorch's own CPU index; on macOS PyPI's wheel
#   cuda  PyPI's build with the CUDA packages of cuda.txt
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
torch=${TORCH:-auto}
if [ "$torch" = auto ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then torch=cuda; else torch=cpu; fi
fi
version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$here/lock.txt")
case "$torch" in
  cuda)
    echo "torch $version with CUDA, from PyPI"
    "${pip[@]}" install --require-hashes --no-deps -r "$here/lock.txt" -r "$here/cuda.txt"
    ;;
  cpu)
    if [ "$(uname)" = Darwin ] || "${pip[@]}" download --no-deps --no-index -d "$(mktemp -d)" "torch==$version" >/dev/null 2>&1; then
      echo "torch $version for the CPU, from pip's own sources"
      "${pip[@]}" install --require-hashes --no-deps -r "$here/lock.txt"
    else
      # PyTorch's CPU wheels carry another version label than PyPI's, so this one file is not checked by our hashes.
      echo "torch $version for the CPU, from PyTorch's index"
      "${pip[@]}" install --no-deps "torch==$version" --index-url https://download.pytorch.org/whl/cpu
      rest=$(mktemp)
      awk '/^[a-zA-Z0-9]/ {skip = ($0 ~ /^torch==/)} !skip' "$here/lock.txt" > "$rest"
      "${pip[@]}" install --require-hashes --no-deps -r "$rest"
    fi
    ;;
  *)
    echo "TORCH is '$torch'; it must be auto, cpu or cuda" >&2
    exit 2
    ;;
esac
"${pip[@]}" install --no-deps --no-build-isolation --editable "$here/.."
