#!/usr/bin/env bash
# Installs the locked packages into the virtual environment $1 and this repository into it, editable.
# With `packages` or `repository` as $2 only one of the two: layers of the image.
#
# torch is chosen by TORCH (default: auto):
#   auto  a machine with an NVIDIA GPU (nvidia-smi lists one) takes cuda; any other takes cpu
#   cpu   a CPU wheel at hand (pip's find-links), else PyTorch's own CPU index; on macOS PyPI's wheel
#   cuda  PyPI's build with the CUDA packages of cuda.txt
# DEV=no leaves out what only tests and checks need.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
what=${2:-all}
repository() { "${pip[@]}" install --no-deps --no-build-isolation --editable "$here/.."; }
if [ "$what" = repository ]; then repository; exit; fi
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
    if [ "$(uname)" = Darwin ]; then
      echo "torch $version for the CPU, from PyPI"
      "${pip[@]}" install --require-hashes --no-deps -r "$here/lock.txt"
    else
      # Apart and first: offered both, pip would take PyPI's CUDA build, because an index states the file's hash and a
      # folder does not.
      only=$(mktemp) rest=$(mktemp)
      awk '/^[a-zA-Z0-9]/ {keep = ($0 ~ /^torch==/)} keep' "$here/lock.txt" > "$only"
      awk '/^[a-zA-Z0-9]/ {keep = ($0 !~ /^torch==/)} keep' "$here/lock.txt" > "$rest"
      if "${pip[@]}" install --no-index --require-hashes --no-deps -r "$only" 2>/dev/null; then
        echo "torch $version for the CPU, from a wheel at hand"
      else
        # PyTorch's CPU wheels are not PyPI's files, so this one is not checked by our hashes.
        echo "torch $version for the CPU, from PyTorch's index"
        "${pip[@]}" install --no-deps "torch==$version" --index-url https://download.pytorch.org/whl/cpu
      fi
      "${pip[@]}" install --require-hashes --no-deps -r "$rest"
      rm -f "$only" "$rest"
    fi
    ;;
  *)
    echo "TORCH is '$torch'; it must be auto, cpu or cuda" >&2
    exit 2
    ;;
esac
if [ "${DEV:-yes}" = yes ]; then "${pip[@]}" install --require-hashes --no-deps -r "$here/dev.txt"; fi
if [ "$what" = all ]; then repository; fi
