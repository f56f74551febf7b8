"""Does a preprocess job read anything that its keys do not cover? Decoding and encoding, audited on real files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

import crab
import crab_platform
import jobs
from crab.encoders.declared import RESULT_VARIABLES, declared_files
from crab.media import DecodeRequest, Failure, decode_request
from crab.sampling import AudioSampling
from crab_platform.audit import Access, Declared, Report, audited, judge, python_packages
from crab_platform.work import Array, Decoder, DecodeTask, Undecoded, Work
from jobs.preprocess import build_work
from jobs.presets import encoder_configs
from jobs.spec import PreprocessSpec

PLACEMENT_VARIABLES = (
    "COLUMNS",
    "CUDA_VISIBLE_DEVICES",
    "HF_DEACTIVATE_ASYNC_LOAD",
    "HOME",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "LINES",
    "OMP_NUM_THREADS",
    "PATH",
    "TMPDIR",
)
"""Variables that may be asked for while features are made: they say where and how fast, never what."""


def declared_inputs(spec: PreprocessSpec, files: Sequence[str]) -> Declared:
    """All that may decide the features of these media files."""
    weights = [file for config in encoder_configs(spec.encoders) for file in declared_files(config)]
    return Declared(
        files=frozenset([*map(os.path.abspath, files), *map(str, weights)]),
        code=python_packages(crab, crab_platform, jobs),
        variables=PLACEMENT_VARIABLES,
    )


def audit(spec: PreprocessSpec, files: Sequence[str], work: Work | None = None) -> Report:
    """Loads the encoders of a job and encodes every stream of the files, as its workers do, but in this process.

    A stream that a file lacks is left out. A variable that changes results counts as a problem when it is set at all,
    because native libraries read it unseen.
    """
    work = work or build_work(spec)
    import_all(work)
    report = audited(partial(make_features, work, files, decode_here), declared_inputs(spec, files))
    return Report(accesses=report.accesses, problems=(*report.problems, *variables_that_are_set()))


def judge_accesses(
    spec: PreprocessSpec, files: Sequence[str], accesses: Sequence[Access]
) -> Report:
    """The same judgement of what was seen from outside (`crab_platform.syscalls`)."""
    return judge(accesses, declared_inputs(spec, files))


def variables_that_are_set() -> tuple[str, ...]:
    return tuple(
        f"the variable {name}={os.environ[name]} is set; it changes features and is in no key"
        for name in RESULT_VARIABLES
        if name in os.environ
    )


def import_all(work: Work) -> None:
    """Loads the encoders once: what libraries look at while they are imported is no input of a feature."""
    for stream in work.streams.values():
        stream.make_encoder()


def make_features(work: Work, files: Sequence[str], decode: Decoder) -> int:
    """Decodes and encodes all streams of all files; how many features there were."""
    encoders = {name: stream.make_encoder() for name, stream in work.streams.items()}
    requests = {name: stream.request for name, stream in work.streams.items()}
    made = 0
    for file in files:
        for name, array in decode(DecodeTask(path=file, requests=requests)).items():
            if not isinstance(array, Undecoded):
                encoders[name](array)
                made += 1
    return made


def decode_here(task: DecodeTask) -> Mapping[str, Array | Undecoded]:
    """What a decoding child does, in this process."""
    found: dict[str, Array | Undecoded] = {}
    for name, request in task.requests.items():
        kind = "audio" if isinstance(request, AudioSampling) else "video"
        decoded = decode_request(DecodeRequest(source=task.path, **{kind: request}))
        value = decoded.audio if kind == "audio" else decoded.video
        if isinstance(value, Failure):
            found[name] = Undecoded(reason=str(value.reason), detail=value.detail)
        elif value is not None:
            found[name] = value
    return found
