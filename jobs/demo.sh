#!/usr/bin/env bash
# The main job on one machine, in five commands that can be typed one by one. Started again, it redoes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
clips=${1:-200}
say() { printf '\n\033[1m$ %s\033[0m\n' "$*" >&2; "$@"; }
say crab synth work/shapes --clips "$clips" --seed 1
say crab run jobs/specs/preprocess-shapes.yaml
say crab run jobs/specs/train-shapes.yaml
say crab run jobs/specs/evaluate-shapes.yaml
say crab predict --adapter train-shapes --task avqa --question "How many objects are heard in the clip?" \
  work/shapes/clips/shapes-1-000004.mp4
cat >&2 <<TEXT

Done. Every job is a run in MLflow, with its spec, commit, manifest, metrics and files. To look at them:
  .venv/bin/mlflow ui --backend-store-uri sqlite:///work/mlflow.db
Answers beside what was expected: work/runs/evaluate-shapes/predictions.jsonl
TEXT
