"""Sampling: which moments, spelled in whole numbers."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab.sampling import AudioSampling, VideoSampling, music_avqa_audio


def test_ten_frames_of_ten_seconds_are_one_a_second():
    assert VideoSampling().times_us(10_000_000) == tuple(range(0, 10_000_000, 1_000_000))


@given(st.integers(1, 5000), st.integers(1, 64))
def test_frame_times_pick_the_frames_of_crabs_arange(vlen, num_frames):
    # Crab: np.arange(0, vlen, vlen / num) as indices; here on a 25 fps grid, 40 000 us a frame.
    times = VideoSampling(num_frames=num_frames).times_us(vlen * 40_000)
    ours = [(time + 1) // 40_000 for time in times]  # + 1: times are rounded down to microseconds
    assert ours == [i * vlen // num_frames for i in range(num_frames)]
    assert len(times) == num_frames
    assert all(0 <= time < vlen * 40_000 for time in times)


def test_segments_of_a_second_touch_each_other():
    segments = AudioSampling().segments_ms()
    assert segments[0] == (0, 1000)
    assert all(end == start for (_, end), (start, _) in pairwise(segments))
    assert AudioSampling().segment_samples == 16_000


def test_music_avqa_windows_are_centred_as_in_crab():
    sampling = music_avqa_audio()
    expected = [(t * 1000 - 500, t * 1000 + 1500) for t in np.arange(0, 60, 6)]
    assert list(sampling.segments_ms()) == expected
    assert sampling.segment_samples == 32_000
    assert sampling.segment_starts()[0] == -8_000


@pytest.mark.parametrize("sampling", [VideoSampling(), AudioSampling(), music_avqa_audio()])
def test_records_are_json_of_ints_and_strings(sampling):
    record = sampling.record()
    assert json.loads(json.dumps(record)) == record
    assert all(type(value) in (int, str) for value in record.values())


def test_records_differ_when_the_sampling_does():
    samplings = [
        VideoSampling(),
        VideoSampling(num_frames=8),
        VideoSampling(size=448),
        AudioSampling(),
        AudioSampling(num_segments=5),
        AudioSampling(segment_ms=2000),
        AudioSampling(stride_ms=500),
        AudioSampling(offset_ms=-500),
        AudioSampling(sample_rate_hz=48_000),
    ]
    assert len({json.dumps(s.record()) for s in samplings}) == len(samplings)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: VideoSampling(num_frames=0), "num_frames is 0"),
        (lambda: VideoSampling(size=-1), "size is -1"),
        (lambda: VideoSampling(num_frames=2.5), "whole number"),
        (lambda: VideoSampling(num_frames=True), "whole number"),
        (lambda: AudioSampling(segment_ms=0), "segment_ms is 0"),
        (lambda: AudioSampling(stride_ms=0), "stride_ms is 0"),
        (lambda: AudioSampling(segment_ms=1, sample_rate_hz=22_050), "whole number of samples"),
        (lambda: AudioSampling(num_segments=4096, stride_ms=60_000), "fewer segments"),
        (lambda: VideoSampling().times_us(-1), "duration_us is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()
