"""What a spec says of memory and of watching reaches DeepSpeed and Ray Train, or is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.callbacks.nccl_ras import NCCLRASCallback
from ray.train.v2._internal.constants import (
    ENABLE_NCCL_HANG_DETECTOR_ENV_VAR,
    NCCL_RAS_ACTION_ENV_VAR,
)

from crab_platform import nccl_watch
from crab_platform.training_config import TrainingConfig, deepspeed_config
from jobs.spec import SpecError, parse_spec

PLACES = ("offload_optimizer", "offload_param")


def zero(**changes: Any) -> dict[str, Any]:
    settings = deepspeed_config(TrainingConfig(name="run", storage_path="/tmp", **changes))
    return dict(settings["zero_optimization"])


@pytest.mark.parametrize("use_gpu", [True, False])
def test_offload_is_what_deepspeed_calls_it(use_gpu: bool) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    host = {"device": "cpu", "pin_memory": use_gpu}
    wanted = {
        ("none", 3): {},
        ("optimizer", 3): {"offload_optimizer": host},
        ("optimizer", 2): {"offload_optimizer": host},
        ("all", 3): {"offload_optimizer": host, "offload_param": host},
    }
    for (offload, stage), expected in wanted.items():
        found = zero(offload=offload, zero_stage=stage, use_gpu=use_gpu)
        assert {name: found[name] for name in PLACES if name in found} == expected
        read = DeepSpeedZeroConfig(**found)
        for name in PLACES:
            place = getattr(read, name)
            assert (place is not None and place.device == "cpu") == (name in expected)


@pytest.mark.parametrize(
    ("offload", "stage", "match"),
    [
        ("all", 2, "zero_stage 2 offloads the optimizer only"),
        ("all", 0, "zero_stage 0 offloads nothing"),
        ("optimizer", 0, "zero_stage 0 offloads nothing.*zero_stage 2 or 3"),
    ],
)
def test_offload_that_deepspeed_cannot_do_is_refused(offload: str, stage: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        zero(offload=offload, zero_stage=stage)
    with pytest.raises(SpecError, match=match):
        parse_spec(train_spec(workers={"offload": offload, "zero_stage": stage}))


def train_spec(**changes: Any) -> dict[str, Any]:
    return {
        "job": "train",
        "name": "t",
        "data": [{"name": "d", "samples": "d.jsonl"}],
        "features": {"cache": "c", "manifest": "m"},
        "optimisation": {"steps": 1, "batch_size": 2},
    } | changes


def test_a_spec_says_it_in_its_own_words() -> None:
    spec: Any = parse_spec(train_spec())
    assert (spec.workers.offload, spec.workers.activation_checkpointing) == ("none", False)
    assert spec.workers.health_every == 10
    with pytest.raises(SpecError, match="health_every"):
        parse_spec(train_spec(workers={"health_every": -1}))
    with pytest.raises(SpecError, match="offload"):
        parse_spec(train_spec(workers={"offload": "disk"}))


def test_specs_are_checked_without_torch() -> None:
    """Jobs whose features are cached start without it."""
    code = "import sys, jobs.spec, crab_platform.offload; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path.cwd())


def test_nccl_is_observed_with_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RAY_TRAIN_"):
            monkeypatch.delenv(name)
    with nccl_watch.observed(use_gpu=False, hang_timeout_s=50):
        assert ENABLE_NCCL_HANG_DETECTOR_ENV_VAR not in os.environ
    with nccl_watch.observed(use_gpu=True, hang_timeout_s=50):
        assert os.environ[ENABLE_NCCL_HANG_DETECTOR_ENV_VAR] == "1"
        callback = NCCLRASCallback()  # what Ray Train makes in the driver
        assert callback._action == "observe"
        assert callback._confirm_duration_s < 50
    assert not [name for name in os.environ if name.startswith("RAY_TRAIN_")]
    monkeypatch.setenv(NCCL_RAS_ACTION_ENV_VAR, "fail")
    with nccl_watch.observed(use_gpu=True, hang_timeout_s=50):
        assert os.environ[NCCL_RAS_ACTION_ENV_VAR] == "fail"
    assert os.environ[NCCL_RAS_ACTION_ENV_VAR] == "fail"
