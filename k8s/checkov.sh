#!/usr/bin/env bash
# checkov over what k8s/ renders and over the pods of a job: k8s/checkov.sh (CHECKOV=... where it is installed)
# In an environment of its own: it is no dependency. RayJobs are unwrapped to Pods first, as checkov skips kinds it does not know.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/objects"
if [ -z "${CHECKOV:-}" ]; then
  python3 -m venv "$folder/env"
  "$folder/env/bin/pip" install --quiet checkov==3.3.30
  CHECKOV=$folder/env/bin/checkov
fi
for overlay in prod kind; do kubectl kustomize "k8s/overlays/$overlay" > "$folder/objects/$overlay.yaml"; done
"$python" - "$folder/objects/job.yaml" <<'EOF'
import sys
from pathlib import Path
import yaml
from jobs.submit import manifest_of
job = manifest_of("jobs/specs/train-shapes.yaml", [], "eks-example")
cluster = job["spec"]["rayClusterSpec"]
pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
Path(sys.argv[1]).write_text(yaml.safe_dump_all(
    {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{n}", "namespace": "crab", **pod["metadata"]}, "spec": pod["spec"]}
    for n, pod in enumerate(pods)))
EOF
"$CHECKOV" --directory "$folder/objects" --framework kubernetes --skip-download --compact --quiet
