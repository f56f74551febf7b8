#!/usr/bin/env bash
# What a bare Debian or Ubuntu lacks: venv for Python, and g++ with Python's headers, because DeepSpeed compiles one
# small operator when it first runs on a CPU.
set -euo pipefail
python=$1
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
  echo "Python 3.11 or 3.12 is needed, $python is $("$python" --version). Give another: make PYTHON=python3.12 ..." >&2
  exit 2
}
missing=()
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
command -v g++ >/dev/null || missing+=(g++)
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
[ -e "$header" ] || missing+=(python3-dev)
[ ${#missing[@]} -eq 0 ] && exit 0
install=(apt-get install --yes --no-install-recommends "${missing[@]}")
if ! command -v apt-get >/dev/null; then
  echo "missing: ${missing[*]}; install them with this system's package manager" >&2
  exit 2
elif [ "$(id -u)" = 0 ]; then
  apt-get update --quiet && DEBIAN_FRONTEND=noninteractive "${install[@]}"
elif command -v sudo >/dev/null; then
  sudo apt-get update --quiet && sudo "${install[@]}"
else
  echo "missing: ${missing[*]}; as root: apt-get update && ${install[*]}" >&2
  exit 2
fi
