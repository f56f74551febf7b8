"""`crab plan` of a train job: what each worker needs in memory, from configurations alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_crab
from transformers import LlamaConfig

from crab.model.build import build_model
from crab.model.config import AdapterConfig, CrabConfig, LlmConfig
from crab.model.meta import decoder_sizes, meta_model
from jobs.plan import plan_spec
from jobs.plan_memory import memory_of, show_memory
from jobs.spec import TrainSpec, parse_spec

FROZEN, TRAINED = 6_738_415_616, 154_174_480
NORMS = 65 * 4096  # of 32 layers two, and the last one: below the threshold, so they stay whole


def train_spec(folder: Path, model: dict[str, Any], **changes: Any) -> TrainSpec:
    spec = parse_spec(
        {
            "job": "train",
            "name": "a",
            "runs": str(folder / "runs"),
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            "data": [{"name": "d", "samples": str(folder / "samples.jsonl")}],
            "features": {"cache": str(folder / "cache"), "manifest": "prep"},
            "model": model,
            "optimisation": {"steps": 2, "batch_size": 32, "dtype": "bfloat16"},
            "workers": {"count": 8, "gpu": True},
        }
        | changes
    )
    assert isinstance(spec, TrainSpec)
    return spec


def by_workers(memory: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {column["workers"]: column for column in memory["by_workers"]}


def test_the_paper_preset_without_any_weights(tmp_path: Path) -> None:
    memory = memory_of(train_spec(tmp_path, {"preset": "paper"}))
    assert (memory["frozen"], memory["trained"]) == (FROZEN, TRAINED)
    assert memory["notes"] == ["model.llm names no folder: sizes are those of Llama-2-7B"]
    columns = by_workers(memory)
    assert list(columns) == [1, 2, 4, 8, 16]
    alone, eight = columns[1], columns[8]
    assert alone["frozen"] == 2 * FROZEN
    assert eight["frozen"] == 2 * FROZEN // 8 + 2 * NORMS
    assert (alone["trained"], alone["gradients"]) == (2 * TRAINED, 2 * TRAINED)
    assert alone["optimizer"] == 12 * TRAINED
    assert eight["optimizer"] == pytest.approx(12 * TRAINED / 8, rel=1e-4)  # padded
    # What may be live at once, and the largest of all, the embedding.
    assert (alone["gathered"], eight["gathered"]) == (0, 2 * (1_000_000_000 + 32_000 * 4096))
    assert {column["buffers"] for column in columns.values()} == {2 * 50_000_000}
    for column in columns.values():
        parts = ("frozen", "trained", "gradients", "optimizer", "gathered", "buffers")
        assert column["together"] == sum(column[part] for part in parts)
        assert column["micro_batch"] == 32 // column["workers"]
        assert 0 < column["activations_checkpointed"] < column["activations"] / 10
    assert alone["activations"] == 16 * columns[16]["activations"]


def test_people_are_shown_the_table_and_machines_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = train_spec(tmp_path, {"preset": "paper"}, optimisation={"steps": 1, "batch_size": 6})
    result = plan_spec(spec)
    assert json.loads(json.dumps(result))["memory"]["dtype"] == "float32"
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "ZeRO-3, float32; 154,174,480 of 6,892,590,096 weights are trained" in said
    assert "frozen weights 27 GB 13.5 GB 6.74 GB" in said
    assert "samples at a time 6 3 - - -" in said
    assert "-: batch_size 6 does not divide" in said
    assert by_workers(result["memory"])[4]["activations"] is None
    assert list(tmp_path.iterdir()) == []  # nothing was touched


def test_sizes_come_from_the_folder_of_a_language_model(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
    ).save_pretrained(tmp_path / "llm")  # no weights beside it
    for preset in ("paper", "tiny"):
        memory = memory_of(train_spec(tmp_path, {"preset": preset, "llm": str(tmp_path / "llm")}))
        assert memory["frozen"] == 2 * 100 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
        assert memory["notes"] == []
    absent = str(tmp_path / "absent")
    memory = memory_of(train_spec(tmp_path, {"preset": "tiny", "llm": absent}))
    assert absent in memory["unknown"]
    memory = memory_of(train_spec(tmp_path, {"preset": "paper", "llm": absent}))
    assert memory["frozen"] == FROZEN
    assert absent in memory["notes"][0]


def test_what_a_spec_sets_is_counted(tmp_path: Path) -> None:
    adapter = {"num_heads": 5, "lora_dropout": 0.0}
    model = {"preset": "paper", "set": {"adapter": adapter, "llm": {"dtype": "bfloat16"}}}
    memory = memory_of(train_spec(tmp_path, model, workers={"count": 3, "zero_stage": 2}))
    assert memory["trained"] == TRAINED - 45_162_496 + 69_197_824
    columns = by_workers(memory)
    assert 3 in columns
    assert {column["frozen"] for column in columns.values()} == {2 * FROZEN}
    assert {column["gathered"] for column in columns.values()} == {0}


def test_offload_and_checkpointing_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def column(**workers: Any) -> dict[str, Any]:
        spec = train_spec(tmp_path, {"preset": "paper"}, workers={"count": 2, **workers})
        show_memory(memory_of(spec))
        return by_workers(memory_of(spec))[2]

    here, optimizer, both = (column(gpu=True, offload=o) for o in ("none", "optimizer", "all"))
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said.count("offloaded to the host") == 2
    assert "activations, about, as set" in said
    assert here["host"] == 0
    saved = here["gradients"] + here["optimizer"]
    assert optimizer["together"] == here["together"] - saved
    assert optimizer["host"] > saved
    assert both["frozen"] < here["frozen"] / 100  # what is kept whole, and nothing else
    assert both["host"] > optimizer["host"] + 2 * FROZEN / 2
    on_cpu = column(gpu=False)["together"]
    assert column(gpu=False, offload="all")["together"] >= on_cpu  # one memory: nothing is saved
    capsys.readouterr()
    column(activation_checkpointing=True)
    assert "with checkpointing, as set" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("method", ["interaction_lora", "lora", "none"])
def test_the_meta_model_is_the_model(method: str) -> None:
    real, *_ = tiny_crab.model(method)
    meta = meta_model(tiny_crab.config(method))

    def outline(model: Any) -> dict[str, tuple[Any, ...]]:
        return {
            name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()
        }

    assert outline(meta) == outline(real)
    assert all(p.is_meta for p in meta.parameters())


def test_activations_of_another_kind_of_language_model_are_unknown(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": 400, "n_embd": 48, "n_layer": 1, "n_head": 2}
    base = tiny_crab.config()
    config = base.model_copy(
        update={"llm": LlmConfig(architecture=gpt2), "adapter": AdapterConfig(method="none")}
    )
    assert decoder_sizes(meta_model(CrabConfig.model_validate(config.model_dump()))) is None
    assert decoder_sizes(build_model(base, tiny_crab.tokenizer())) is not None
