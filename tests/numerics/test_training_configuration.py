"""What a spec may say of memory changes no bit of what is learnt, and what is exported is what the engine had learnt.

Two workers, ZeRO-3 with nothing kept whole, dropout, masks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_training import TEXT, Plan, Run, run, write_llm

from crab_platform import checkpoint
from crab_platform.ray_cluster import connected
from crab_platform.storage import open_store

pytestmark = pytest.mark.ray

DROPOUT = 0.2
SAME = ("loss", "gradient_norm", "samples", "tokens", "mask_loss", "router/entropy")
"""And whatever else of the routers."""


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


def assert_same(mine: Run, theirs: Run) -> None:
    """Losses, gradient norms, health of the routers and every exported tensor have the same bits."""
    assert mine.steps == theirs.steps
    for got, expected in zip(mine.metrics, theirs.metrics, strict=True):
        names = [n for n in expected if n in SAME or n.startswith("router/")]
        assert len(names) >= len(SAME)
        assert {n: got[n] for n in names} == {n: expected[n] for n in names}, got["step"]
    found, wanted = mine.exported(), theirs.exported()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_recomputed_activations_change_no_bit(llm: str, plain: Run, tmp_path: Path) -> None:
    assert_same(sharded(plan(llm, tmp_path, recomputes=True)), plain)


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_what_is_offloaded_changes_no_bit(
    llm: str, plain: Run, tmp_path: Path, offload: str
) -> None:
    offloaded = sharded(plan(llm, tmp_path), offload=offload)
    assert_same(offloaded, plain)
    # Its checkpoints too, with Adam's moments: any run may go on from them.
    mine, theirs = (
        checkpoint.read(open_store(r.folder), r.checkpoint(4).name) for r in (offloaded, plain)
    )
    assert mine[0].adam_step == theirs[0].adam_step
    assert mine[1].keys() == theirs[1].keys()
    assert [n for n, tensor in mine[1].items() if not torch.equal(tensor, theirs[1][n])] == []


def goes_on(plain: Run, out: Path, **changes: Any) -> Run:
    """From a copy of the checkpoint after step 4."""
    source = plain.checkpoint(4)
    shutil.copytree(source, out / "run" / source.name)
    again = sharded(plan(plain.plan.llm, out, recomputes=True), **changes)
    assert again.steps == [5, 6]
    return again


def test_a_run_goes_on_with_everything_offloaded_and_recomputed(plain: Run, tmp_path: Path) -> None:
    again = goes_on(plain, tmp_path, offload="all")
    assert_same(again, replace(plain, metrics=plain.metrics[4:]))


@pytest.mark.slow
def test_the_second_stage_offloads_its_optimizer(plain: Run, tmp_path: Path) -> None:
    here = goes_on(plain, tmp_path / "here", zero_stage=2)
    assert_same(goes_on(plain, tmp_path / "host", zero_stage=2, offload="optimizer"), here)
    assert here.losses == pytest.approx(plain.losses[4:], rel=1e-6)


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
        sharded(plan(llm, tmp_path, steps=2, without_gathering=True), max_failures=0)
    assert not (tmp_path / "adapter").exists()
