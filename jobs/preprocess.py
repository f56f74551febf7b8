"""Clips become cached features and a manifest: `crab run SPEC` with `job: preprocess`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from typing import Any

from crab.encoders.config import EncoderConfig
from crab.encoders.identity import EncoderIdentity, expect_record, identify
from crab.media import DecodePool, DecodeRequest, Failure, decode_record
from crab.sampling import AudioSampling, VideoSampling, music_avqa_audio
from crab_platform import tracking
from crab_platform.catalog import Manifest
from crab_platform.commits import Writer
from crab_platform.packs import tolerance_of
from crab_platform.pipeline import Summary, preprocess
from crab_platform.usage import Usage
from crab_platform.work import (
    Array,
    DecodeTask,
    Encode,
    PipelineConfig,
    StreamWork,
    Undecoded,
    Work,
)
from jobs.caches import check_sees_what_it_writes, open_cache, record_usage, whoami
from jobs.data import load_dataset, merge_sources
from jobs.output import RESULT, console, line, progress, table, write_result
from jobs.presets import encoder_configs
from jobs.spec import Decode, PreprocessSpec, SpecError, spec_record


def run(spec: PreprocessSpec) -> dict[str, object]:
    """Runs the job and returns its result, which is also in result.json of the run's folder."""
    check_sees_what_it_writes(spec.cache)
    datasets = [load_dataset(source, spec.sampling.tasks) for source in spec.data]
    sources = merge_sources(source for dataset in datasets for source in dataset.sources)
    work = build_work(spec)
    with (
        tracking.start_run(
            spec.tracking.uri,
            spec.tracking.experiment,
            spec.name,
            spec=spec_record(spec),
            folder=spec.folder,
        ) as run,
        progress("clips", len(sources)) as bar,
    ):
        writer = Writer(run=run.run_id, experiment=spec.tracking.experiment, team=spec.cache.team)
        work = replace(work, open_cache=partial(open_cache, spec.cache, writer))
        manifest, summary = preprocess(work, sources, bar)
        return _record(spec, run, manifest, summary)


def build_work(spec: PreprocessSpec) -> Work:
    """What has to be decoded and encoded, and how it is keyed."""
    video, audio = encoder_configs(spec.encoders)
    vision, hearing = identify(video), identify(audio)
    if vision.image_size is None or hearing.stream != "audio":
        raise SpecError("encoders: video needs an encoder of kind clip, audio one of kind beats")
    frames = spec.sampling.video(vision.image_size)
    still = VideoSampling(num_frames=1, size=vision.image_size)
    sounds: dict[str, AudioSampling] = {"audio": spec.sampling.audio()}
    if "music-avqa" in spec.sampling.tasks.values():
        sounds["audio:music-avqa"] = music_avqa_audio()
    ways: list[tuple[str, VideoSampling | AudioSampling, EncoderIdentity, EncoderConfig]] = [
        ("video", frames, vision, video),
        ("image", still, vision, video),
        *((name, sampling, hearing, audio) for name, sampling in sounds.items()),
    ]
    streams = {
        name: StreamWork(
            stream=name.partition(":")[0],
            sampling=sampling.record(),
            encoder=encoder.record,
            dtype=spec.encoders.store_as,
            codec=spec.encoders.codec,
            device="cuda" if spec.pipeline.encode_gpus else "cpu",
            tolerance=tolerance_of(spec.encoders.store_as, config.dtype),
            request=sampling,
            make_encoder=partial(_make_encoder, config, encoder.record),
        )
        for name, sampling, encoder, config in ways
    }
    return Work(
        name=spec.name,
        by=whoami(),
        open_cache=partial(open_cache, spec.cache),
        keep_decoded_bytes=int(spec.decoded_windows.max_clip_mb * 1e6)
        if spec.decoded_windows
        else 0,
        keep_s=spec.cache.keep_days * 86400,
        streams=streams,
        decode=decode_record(),
        make_decoder=partial(_make_decoder, spec.decode, spec.pipeline.decode_processes),
        config=PipelineConfig(**spec.pipeline.model_dump()),
    )


class PoolDecoder:
    """The decode pool as the pipeline calls it. Lives in a Ray worker; its children end with it."""

    def __init__(self, limits: Decode, processes: int) -> None:
        self._pool = DecodePool(
            num_workers=processes,
            timeout_s=limits.timeout_s,
            memory_bytes=limits.memory_mb << 20,
            max_items_per_child=limits.clips_per_process,
        )

    def __call__(self, task: DecodeTask) -> Mapping[str, Array | Undecoded]:
        found: dict[str, Array | Undecoded] = {}
        pictures = [name for name in task.requests if not name.startswith("audio")]
        sounds = [name for name in task.requests if name.startswith("audio")]
        # One opening serves a picture and a sound; only a file that is sampled in two ways is opened twice.
        for picture, sound in zip_longest(pictures, sounds):
            request = DecodeRequest(
                source=task.path,
                video=task.requests.get(picture),
                audio=task.requests.get(sound),
            )
            (result,) = self._pool.decode([request])
            for name, value in ((picture, result.decoded.video), (sound, result.decoded.audio)):
                if name is not None and value is not None:
                    found[name] = _undecoded(value) if isinstance(value, Failure) else value
        return found


def _undecoded(failure: Failure) -> Undecoded:
    return Undecoded(reason=str(failure.reason), detail=failure.detail)


def _make_decoder(limits: Decode, processes: int) -> PoolDecoder:
    return PoolDecoder(limits, processes)


def _make_encoder(config: EncoderConfig, record: Mapping[str, Any]) -> Encode:
    """Raises ValueError where the weights are no longer those of the record, which stands in the keys."""
    from crab.encoders.load import (
        load_encoder,  # torch and transformers, which a warm job does not need
    )

    encoder = load_encoder(config)
    expect_record(config, encoder.record(), record)
    return encoder.encode


def _record(
    spec: PreprocessSpec, run: tracking.Run, manifest: Manifest, summary: Summary
) -> dict[str, object]:
    """Logs what happened and returns result.json."""
    result = {
        "job": spec.job,
        "name": spec.name,
        "cache": spec.cache.url,
        "sampling": spec.sampling.model_dump(mode="json"),
        "mlflow_run": run.run_id,
        **asdict(summary),
    }
    by_encoder = summary.by_encoder
    uses = by_encoder.values()
    run.metrics(
        {
            "files": summary.files,
            "hits": summary.hits,
            "encoded": summary.encoded,
            "set_aside": sum(summary.set_aside.values()),
            "media_bytes_read": summary.media_bytes_read,
            "feature_bytes_written": summary.feature_bytes_written,
            # What its hits would have taken: seconds of a core, or of the encoder's device.
            "saved/decode_seconds": sum(use.saved_decode_s for use in uses),
            "saved/encode_seconds": sum(use.saved_encode_s for use in uses),
            **{f"seconds/{name.replace(' ', '_')}": s for name, s in summary.seconds.items()},
        }
    )
    run.dataset(spec.name, manifest.digest, f"{spec.cache.url}/{manifest.path}")
    write_result(spec.folder, result)
    record_usage(
        spec.cache,
        Usage(
            kind="preprocess",
            job=spec.name,
            run=run.run_id,
            experiment=spec.tracking.experiment,
            team=spec.cache.team,
            manifest=manifest.digest,
            hits={name: use.hits for name, use in by_encoder.items() if use.hits},
            encoded={name: use.encoded for name, use in by_encoder.items() if use.encoded},
            saved_decode_s=sum(use.saved_decode_s for use in uses),
            saved_encode_s=sum(use.saved_encode_s for use in uses),
            device="cuda" if spec.pipeline.encode_gpus else "cpu",
            spent_decode_s=sum(use.spent_decode_s for use in uses),
            spent_encode_s=sum(use.spent_encode_s for use in uses),
            feature_bytes_written=summary.feature_bytes_written,
            layers=sorted(
                {row.entry.layer for row in manifest.ready() if row.entry and row.entry.layer}
            ),
        ),
    )
    run.file(spec.folder / RESULT)
    _show(spec, manifest, summary)
    return result


def _show(spec: PreprocessSpec, manifest: Manifest, summary: Summary) -> None:
    rows: list[tuple[str, object]] = [
        ("files", summary.files),
        ("hits", f"{summary.hits} streams"),
        ("encoded", f"{summary.encoded} streams of {summary.decoded_files} decoded files"),
        ("set aside", f"{sum(summary.set_aside.values())} streams"),
        ("read", f"{summary.media_bytes_read / 1e6:.1f} MB of media"),
        ("written", f"{summary.feature_bytes_written / 1e6:.1f} MB of features"),
        *((f"{name} time", f"{seconds:.1f} s") for name, seconds in summary.seconds.items()),
    ]
    table(f"{spec.name}: features in {spec.cache.url}", ("what", "how much"), rows)
    line(f"manifest: {manifest.digest}")
    if manifest.set_aside():
        table(
            "set aside, nothing else was lost",
            ("source", "stream", "reason", "detail"),
            [(row.source, row.stream, row.reason, row.detail[:80]) for row in manifest.set_aside()],
        )
    if summary.encoded == 0 and not summary.set_aside:
        console.print("Everything was in the cache: nothing was decoded or encoded.")
