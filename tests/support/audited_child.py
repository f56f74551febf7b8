"""A fresh process that makes the features of some files, audited by itself or by strace from outside.

    python -m support.audited_child audit|trace REQUEST

REQUEST is JSON: {"spec": {...}, "jobs": [{"files": [...], "look": "file" | null, "path": "..."}, ...]}. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from support.planted_reads import planted

from crab_platform.syscalls import BEGIN, END, mark
from crab_platform.work import Work
from jobs.audit import audit, decode_here, import_all, make_features
from jobs.preprocess import build_work
from jobs.spec import PreprocessSpec, parse_spec


def main(how: str, request: str) -> None:
    asked = json.loads(request)
    spec = parse_spec(asked["spec"])
    assert isinstance(spec, PreprocessSpec)
    run = audited_here if how == "audit" else traced_from_outside
    print(json.dumps(run(spec, asked["jobs"])))


def audited_here(spec: PreprocessSpec, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    work = build_work(spec)
    for job in jobs:
        report = audit(spec, job["files"], with_look(work, job))
        reads = [access.what for access in report.accesses if access.kind == "read"]
        found.append({"problems": report.problems, "read": reads})
    return found


def traced_from_outside(spec: PreprocessSpec, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    work = build_work(spec)  # names the encoders; whoever encodes holds what it loads against that
    import_all(work)
    mark(BEGIN)
    decode_in_children = work.make_decoder()  # as it really runs: only the kernel can watch it
    for job in jobs:
        looking = with_look(work, job)
        made = make_features(looking, job["files"], decode_here)
        by_children = make_features(looking, job["files"], decode_in_children)
        found.append({"made": made, "made_by_children": by_children})
    mark(END)
    return found


def with_look(work: Work, job: dict[str, Any]) -> Work:
    return planted(work, job["look"], job["path"]) if job["look"] else work


if __name__ == "__main__":
    main(*sys.argv[1:])
