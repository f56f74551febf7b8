#!/usr/bin/env bash
# nginx (Debian: nginx-light) and the pinned peers of requirements.txt, for python $1, into the folder $2.
set -euo pipefail
python=$1 folder=$2
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin
missing=()
command -v nginx >/dev/null || missing+=(nginx-light)
command -v curl >/dev/null || missing+=(curl)  # webdataset reads http through it
if [ ${#missing[@]} -gt 0 ]; then
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
fi
if ! cmp --silent "$here/requirements.txt" "$folder/requirements.txt"; then
  rm -rf "$folder"
  # Without dependencies: those are in the lock, and nothing of the environment is changed.
  "$python" -m pip --disable-pip-version-check --quiet install --no-deps --target "$folder" -r "$here/requirements.txt"
  cp "$here/requirements.txt" "$folder/requirements.txt"
fi
