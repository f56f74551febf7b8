#!/usr/bin/env bash
# The main job on one machine, in six commands that can be typed one by one. Started again, it redoes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
clips=${1:-200}
say() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }
say crab synth work/shapes --clips "$clips" --seed 1
say crab run jobs/specs/preprocess-shapes.yaml
say crab run jobs/specs/train-shapes.yaml
say crab run jobs/specs/evaluate-shapes.yaml
say crab report evaluate-shapes
say crab predict --adapter train-shapes --task ref-avs --question "the object that sounds first" \
  --out work/predicted work/shapes/clips/shapes-1-000004.mp4
cat >&2 <<TEXT

Done. To look at in any browser:
  scores and examples of all nine tasks   work/runs/evaluate-shapes/report/index.html
  what was just said about one clip       work/predicted/index.html
Every job is a run in MLflow, with its spec, commit, manifest, metrics and files:
  .venv/bin/mlflow ui --backend-store-uri sqlite:///work/mlflow.db
TEXT
