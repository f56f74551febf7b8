"""What is exported is what the engine had learnt, by plain PEFT in a new process; what a spec may say of memory changes
no bit of it; and what the metrics say of throughput. Two workers, ZeRO-3 with nothing kept whole, dropout, masks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_training import TEXT, Plan, Run, run, write_llm

from crab_platform.ray_cluster import connected

pytestmark = pytest.mark.ray

DROPOUT = 0.2


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Folder of the LLM; Ray runs as long as it is asked for."""
    with connected(num_cpus=3):
        yield write_llm(tmp_path_factory.mktemp("llm"))


def plan(llm: str, out: Path, **changes: Any) -> Plan:
    return Plan(llm=llm, out=str(out), dropout=DROPOUT, watches_routers=True, **changes)


def sharded(plan: Plan, **changes: Any) -> Run:
    return run(plan, **({"whole_below": 0} | changes))


@pytest.fixture(scope="module")
def plain(llm: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Neither recomputed nor offloaded; with a checkpoint after 2, 4 and 6 steps."""
    return sharded(plan(llm, tmp_path_factory.mktemp("plain"), keeps_text_logits=True))


def test_a_run_goes_on_with_everything_offloaded_and_recomputed(plain: Run, tmp_path: Path) -> None:
    """From a copy of the checkpoint after step 4; engines alone, and why not all bits: test_engine_placement.py."""
    source = plain.checkpoint(4)
    shutil.copytree(source, tmp_path / "run" / source.name)
    again = sharded(plan(plain.plan.llm, tmp_path, recomputes=True), offload="all")
    assert again.steps == [5, 6]
    first, expected = again.metrics[0], plain.metrics[4]
    routers = [name for name in expected if name.startswith("router/")]
    assert len(routers) == 5
    for name in ("loss", "samples", "tokens", "mask_loss", *routers):
        assert first[name] == expected[name], name
    assert again.losses == pytest.approx(plain.losses[4:], rel=1e-6)


def test_metrics_say_how_fast_it_went_and_who_waited(plain: Run, llm: str, tmp_path: Path) -> None:
    slow = sharded(plan(llm, tmp_path, steps=3, data_s=2.0))
    for metrics in slow.metrics:
        seconds = metrics["seconds_per_step"]
        # The last rank waits for two seconds, rank 0 for that rank, and not for data.
        assert metrics["data_wait_share"] * seconds >= 2.0
        assert metrics["tokens_per_s"] == pytest.approx(metrics["tokens"] / seconds)
        assert metrics["peak_memory_mb"] > 100
    assert all(0 < m["data_wait_share"] < 1 for m in plain.metrics)


_LOGITS_BY_PLAIN_PEFT = """
import sys, torch
import crab.adapter  # registers the method
from peft import PeftModel
from transformers import AutoModelForCausalLM
_, llm, out, ids = sys.argv
base = AutoModelForCausalLM.from_pretrained(llm)
ids = torch.tensor([[int(i) for i in ids.split(",")]])
with torch.no_grad():
    bare = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, out + "/adapter/adapter").eval()
    torch.save({"bare": bare, "adapted": model(input_ids=ids).logits}, out + "/peft.pt")
assert "crab.model" not in sys.modules and "deepspeed" not in sys.modules
"""


def test_plain_peft_gives_the_logits_of_the_engine(llm: str, plain: Run) -> None:
    """In a new process, from the exported folder and the base model alone."""
    out = Path(plain.plan.out)
    path = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    ids = ",".join(map(str, TEXT))
    subprocess.run(
        [sys.executable, "-c", _LOGITS_BY_PLAIN_PEFT, llm, out, ids], check=True, env=path
    )
    again = torch.load(out / "peft.pt")
    engine = [torch.load(out / f"text-{rank}.pt") for rank in range(2)]
    for logits in engine:
        difference = (again["adapted"] - logits).abs().max()
        print(f"largest difference of logits {difference:.2e} of {logits.abs().max():.2f}")
        torch.testing.assert_close(again["adapted"], logits, rtol=1e-6, atol=0)
    # The comparison would be empty if the adapter had learnt nothing.
    assert (again["bare"] - engine[0]).abs().max() > 0.1


def test_an_export_that_nobody_gathered_is_caught(llm: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="missing, unexpected or empty"):
        sharded(plan(llm, tmp_path, steps=3, without_gathering=True), max_failures=0)
    assert not (tmp_path / "adapter").exists()
