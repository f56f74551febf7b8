"""How many pods of which kind of node a job takes on a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable

from crab_platform.cluster_profile import ClusterProfile, NodeGroup
from crab_platform.rayjob import GroupNeed, Kind
from jobs.spec import (
    EvaluateSpec,
    PreprocessSpec,
    SequenceSpec,
    Spec,
    SpecError,
    TrainSpec,
    TuneSpec,
)


def needs_of(spec: Spec, profile: ClusterProfile, misses: int | None = None) -> list[GroupNeed]:
    """The worker groups of a job; of a sequence those that its largest step needs of each kind.

    Args:
        misses: of a preprocess job, how many streams are not in its cache; None: not known. Without any there is
            nothing to encode, and so no GPU is asked for.

    Raises:
        SpecError: one worker is larger than a pod of the profile's nodes.
    """
    if isinstance(spec, SequenceSpec):
        return _largest(need for step in spec.steps for need in needs_of(step, profile))
    groups = profile.node_groups
    if isinstance(spec, PreprocessSpec):
        return _preprocess(spec, profile, misses)
    if isinstance(spec, TrainSpec | TuneSpec):
        train = spec.train if isinstance(spec, TuneSpec) else spec
        workers = train.workers
        group, name = _group(profile, gpu=workers.gpu, who=f"{spec.name}: workers")
        each = _per_pod(
            group, cpus=workers.cpus, gpus=float(workers.gpu), who=f"{spec.name}: a worker"
        )
        trials = 1
        if isinstance(spec, TuneSpec):
            room = group.max_pods * each // workers.count
            if room < 1:
                raise SpecError(
                    f"{spec.name}: a trial of {workers.count} workers does not fit into {group.max_pods} pods of node "
                    f"group {name}"
                )
            wanted = min(spec.search.samples, room)
            trials = min(wanted, spec.search.max_concurrent or wanted)
        return [GroupNeed(group=name, pods=math.ceil(trials * workers.count / each))]
    if isinstance(spec, EvaluateSpec):
        gpu = spec.device.startswith("cuda")
        group, name = _group(profile, gpu=gpu, who=f"{spec.name}: device {spec.device}")
        each = _per_pod(group, cpus=1, gpus=float(gpu), who=f"{spec.name}: a worker")
        return [GroupNeed(group=name, pods=math.ceil(spec.workers / each))]
    return [GroupNeed(group="cpu" if groups.cpu else "gpu", pods=1)]


def _preprocess(
    spec: PreprocessSpec, profile: ClusterProfile, misses: int | None
) -> list[GroupNeed]:
    """Pods come and go with the clips; decoding and encoding on CPUs share a kind, encoding on GPUs has its own."""
    pipeline = spec.pipeline
    if misses == 0:
        return [GroupNeed(group="cpu" if profile.node_groups.cpu else "gpu", pods=1)]
    needs = []
    cpus = (
        float(pipeline.decode_tasks * pipeline.decode_processes)
        if pipeline.mode == "split"
        else 0.0
    )
    if pipeline.encode_gpus:
        group, name = _group(profile, gpu=True, who=f"{spec.name}: pipeline.encode_gpus")
        each = _per_pod(
            group,
            cpus=pipeline.encode_cpus,
            gpus=pipeline.encode_gpus,
            who=f"{spec.name}: an encoding actor",
        )
        needs.append(
            GroupNeed(group=name, pods=math.ceil(pipeline.encode_actors / each), scales=True)
        )
    else:
        cpus += pipeline.encode_actors * pipeline.encode_cpus
    if cpus:
        group, name = _group(profile, gpu=False, who=f"{spec.name}: pipeline")
        _per_pod(group, cpus=max(1.0, pipeline.encode_cpus), gpus=0, who=f"{spec.name}: an actor")
        needs.append(GroupNeed(group=name, pods=math.ceil(cpus / group.cpus), scales=True))
    return _largest(needs)


def _group(profile: ClusterProfile, *, gpu: bool, who: str) -> tuple[NodeGroup, Kind]:
    """Of CPUs, where there is such a group, or else of GPUs, which have CPUs too."""
    groups = profile.node_groups
    if gpu and groups.gpu is None:
        raise SpecError(f"{who} wants GPUs, and the profile has no node group gpu")
    if gpu or groups.cpu is None:
        assert groups.gpu is not None
        return groups.gpu, "gpu"
    return groups.cpu, "cpu"


def _per_pod(group: NodeGroup, *, cpus: float, gpus: float, who: str) -> int:
    """How many workers share a pod."""
    fit = math.floor(group.cpus / cpus)
    if gpus:
        fit = min(fit, math.floor(group.gpus / gpus))
    if fit < 1:
        raise SpecError(
            f"{who} takes {cpus:g} CPUs and {gpus:g} GPUs, a pod of the profile has {group.cpus} and {group.gpus}"
        )
    return fit


def _largest(needs: Iterable[GroupNeed]) -> list[GroupNeed]:
    """One need a group: the most pods, and from the start where anyone wants that."""
    found: dict[str, GroupNeed] = {}
    for need in needs:
        before = found.get(need.group, need)
        found[need.group] = GroupNeed(
            group=need.group,
            pods=max(need.pods, before.pods),
            scales=need.scales and before.scales,
        )
    return [found[name] for name in sorted(found)]
