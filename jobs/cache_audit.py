"""`crab cache audit`: is anything read while features are made that no key covers?"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from crab_platform.source import is_local
from jobs.audit import audit
from jobs.cache_open import preprocess_spec
from jobs.data import load_dataset, merge_sources
from jobs.output import line, table
from jobs.spec_errors import SpecError


def run_audit(path: str, clips: int) -> dict[str, Any]:
    """Makes the features of the first clips of a preprocess spec in this process, and reports what was read."""
    spec = preprocess_spec(path)
    datasets = [load_dataset(source, spec.sampling.tasks) for source in spec.data]
    sources = merge_sources(source for dataset in datasets for source in dataset.sources)
    urls = [source.url for source in sources if is_local(source.url)]
    files = [file for url in urls if os.path.exists(file := url.removeprefix("file://"))][:clips]
    if not files:
        raise SpecError(f"{path}: none of its {len(sources)} media files is on this machine")
    report = audit(spec, files)
    kinds = Counter(access.kind for access in report.accesses)
    table(f"read for {len(files)} clips", ("what", "how many"), sorted(kinds.items()))
    for problem in report.problems:
        line(f"undeclared: {problem}")
    if report.ok:
        line("Everything that was read is in the keys, or is code and placement.")
    return {
        "clips": len(files),
        "accesses": dict(kinds),
        "problems": list(report.problems),
        "ok": report.ok,
    }
