"""CrabModel: what is trained, that it learns, and that what it learnt can be saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_crab
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from crab.model.artifact import load_model, save_model
from crab.model.artifact_files import write_digests
from crab.model.build import build_model
from crab.model.collate import Collator
from crab.model.config import AdapterConfig, CrabConfig, LlmConfig, tiny
from crab.model.generate import generate
from crab.model.llm import load_llm, load_tokenizer, tiny_llama
from crab.predict import predict
from crab.train import optimizer_step, parameter_groups


def test_only_adapter_projectors_and_new_tokens_are_trained() -> None:
    model, _, collate = tiny_crab.model()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    parts = ("video_projector.", "audio_projector.", "mask_decoder.", "new_embedding.", "new_head.")
    groups = {"ilora_", *parts}
    names = model.trainable_parameters()
    assert {g for g in groups for n in names if g in n} == groups
    assert all(any(g in n for g in groups) for n in names)
    batch = collate([tiny_crab.example(i) for i in range(2)])
    model(batch)["loss"].backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
    for prefix in ("video_projector.queries", "audio_projector.queries", "new_embedding.rows"):
        assert names[prefix].grad.abs().sum() > 0
    assert names["new_head.rows"].grad.abs().sum() > 0
    # B starts at zero, so A gets no gradient in the first step, and every B does.
    assert all(p.grad.abs().sum() > 0 for n, p in names.items() if n.endswith("weight_b"))
    optimizer_step(model, [batch], torch.optim.SGD(parameter_groups(names)), lr=0.1)
    optimizer_step(model, [batch], torch.optim.SGD(parameter_groups(names)), lr=0.1)
    assert all(p.grad is not None for p in names.values())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("streams", ["v", "a"])
def test_every_trained_parameter_gets_a_gradient_whatever_the_batch_holds(streams: str) -> None:
    """With ZeRO, a rank without audio must still take part in reducing the audio projector."""
    model, _, collate = tiny_crab.model()
    model(collate([tiny_crab.example(0, streams=streams)]))["loss"].backward()
    assert [n for n, p in model.trainable_parameters().items() if p.grad is None] == []
    absent = model.audio_projector if streams == "v" else model.video_projector
    assert all(not p.grad.any() for p in absent.parameters())


def test_building_again_gives_the_same_model_whatever_the_random_state() -> None:
    first = tiny_crab.model()[0].state_dict()
    torch.manual_seed(999)
    second = tiny_crab.model()[0].state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def learnt() -> tuple:
    """A model after 50 steps on one batch, with its first and last loss."""
    model, words, collate = tiny_crab.model()
    examples = [
        tiny_crab.example(0),
        tiny_crab.example(1, streams="v"),
        tiny_crab.example(2, streams="a"),
    ]
    batch = collate(examples)
    optimizer = torch.optim.AdamW(parameter_groups(model.trainable_parameters()))
    losses = [
        float(optimizer_step(model, [batch], optimizer, lr=1e-2)[0]["loss"]) for _ in range(50)
    ]
    return model.eval(), words, collate, examples, losses


def test_learns_one_batch_by_heart_and_says_it(learnt: tuple) -> None:
    model, _, collate, examples, losses = learnt
    assert losses[0] > 4
    assert losses[-1] < 0.05
    predictions = predict(model, collate, examples, max_new_tokens=60, batch_size=2)
    for prediction, example in zip(predictions, examples, strict=True):
        sample = example.sample
        assert prediction.sample_id == sample.id
        assert prediction.text == f"{sample.reasoning} {sample.answer}".strip()
        assert prediction.finished


def test_generation_stops_at_the_limit_and_leaves_the_mode(learnt: tuple) -> None:
    model, _, collate, examples, _ = learnt
    batch = collate(examples, with_target=False)
    model.train()
    short = generate(model, batch, max_new_tokens=3, eos_id=collate.eos_id)
    assert model.training
    model.eval()
    assert [len(ids) for ids in short.ids] == [3, 3, 3]
    assert short.finished == [False] * 3
    again = generate(model, batch, max_new_tokens=60, eos_id=collate.eos_id)
    assert [ids[:3] for ids in again.ids] == short.ids


def test_media_tokens_are_never_written_and_mask_tokens_can_be(learnt: tuple) -> None:
    model, _, collate, examples, _ = learnt
    batch = collate(examples, with_target=False)
    logits = generate(
        model, batch, max_new_tokens=1, eos_id=collate.eos_id, return_logits=True
    ).logits
    ids = model.table.id_of
    assert torch.isneginf(logits[..., [ids["<video>"], ids["<audio_end>"]]]).all()
    assert torch.isfinite(logits[..., [ids["<mask_start>"], ids["<mask_5>"]]]).all()


@pytest.mark.parametrize("method", ["interaction_lora", "lora", "none"])
def test_saved_and_loaded_again_it_says_the_same(method: str, tmp_path: Path) -> None:
    model, words, collate = tiny_crab.model(method)
    batch = collate([tiny_crab.example(0), tiny_crab.example(1, streams="a")])
    optimizer = torch.optim.AdamW(parameter_groups(model.trainable_parameters()))
    optimizer_step(model, [batch], optimizer, lr=1e-2)
    folder = save_model(model, words, tmp_path / "out", lineage={"step": 1})
    loaded, loaded_words = load_model(folder)
    assert not loaded.training
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch)["sample_loss"], model(batch)["sample_loss"])
    again = Collator(loaded.config, loaded_words, loaded.table)
    more = [tiny_crab.example(3)]
    assert torch.equal(again(more)["input_ids"], collate(more)["input_ids"])
    assert json.loads((folder / "crab.json").read_text())["lineage"] == {"step": 1}
    with pytest.raises(FileExistsError):
        save_model(model, words, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_adapter_folder_is_peft_s_own(tmp_path: Path) -> None:
    model, words, _ = tiny_crab.model()
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.01)
    folder = save_model(model, words, tmp_path / "out")
    plain = tiny_crab.build_model(tiny_crab.config("none"), tiny_crab.tokenizer()).base
    wrapped = PeftModel.from_pretrained(plain, str(folder / "adapter")).eval()
    ids = torch.arange(10).unsqueeze(0) + 20
    model.eval()
    assert torch.equal(wrapped(input_ids=ids).logits, model.llm(input_ids=ids).logits)


def test_a_sharded_model_is_saved_from_the_gathered_tensors(tmp_path: Path) -> None:
    model, words, _ = tiny_crab.model()
    state = {name: tensor + 1 for name, tensor in model.trainable_state_dict().items()}
    folder = save_model(model, words, tmp_path / "out", state=state)
    loaded = load_model(folder)[0].trainable_state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    state["new_head.rows"] = torch.empty(0)
    with pytest.raises(ValueError, match=r"new_head\.rows"):
        save_model(model, words, tmp_path / "empty", state=state)
    assert not (tmp_path / "empty").exists()


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model, words, _ = tiny_crab.model()
    state = model.trainable_state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    removed = state.pop("new_head.rows")
    with pytest.raises(ValueError, match=r"1 missing: new_head\.rows"):
        model.load_trainable(state)
    with pytest.raises(ValueError, match="1 unexpected: stray"):
        model.load_trainable(before | {"stray": removed})
    with pytest.raises(ValueError, match=r"new_head\.rows is \(2, 2\)"):
        model.load_trainable(before | {"new_head.rows": torch.zeros(2, 2)})
    assert all(torch.equal(before[n], t) for n, t in model.trainable_state_dict().items())

    folder = save_model(model, words, tmp_path / "out")
    record = json.loads((folder / "crab.json").read_text())
    record["config"]["adapter"]["num_heads"] = 2
    (folder / "crab.json").write_text(json.dumps(record))
    write_digests(folder)
    with pytest.raises(ValueError, match="does not fit the adapter"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match=r"crab\.json"):
        load_model(tmp_path)


def test_frozen_weights_are_not_in_the_files(tmp_path: Path) -> None:
    model, words, _ = tiny_crab.model()
    folder = save_model(model, words, tmp_path / "out")
    saved = [
        tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()
    ]
    assert sum(t.numel() for t in saved) == sum(
        p.numel() for p in model.trainable_parameters().values()
    )


def test_a_batch_that_another_config_made_is_refused() -> None:
    model, _, collate = tiny_crab.model()
    batch = collate([tiny_crab.example(0)])
    with pytest.raises(ValueError, match="video: the batch has 6 placeholders"):
        model(batch | {"video": batch["video"][:1]})
    with pytest.raises(ValueError, match="labels"):
        model(collate([tiny_crab.example(0)], with_target=False))
    with pytest.raises(ValueError, match="labels"):
        generate(model, batch, max_new_tokens=3, eos_id=2)


def test_other_architectures_serve_and_unfit_ones_are_refused() -> None:
    words = tiny_crab.tokenizer()
    config = tiny_crab.config("none")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2))
    model = build_model(config, words, llm=gpt2)
    batch = Collator(config, words, model.table)([tiny_crab.example(0), tiny_crab.example(2)])
    assert torch.isfinite(model(batch)["loss"])
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=400, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(ValueError, match="not a causal LM"):
        build_model(config, words, llm=t5)
    llama = tiny_crab.plain_llm()
    llama.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        build_model(config, words, llm=llama)


def test_an_llm_with_a_padded_vocabulary_and_one_without(words_size: int) -> None:
    """New ids on unused rows of the matrix, or beyond it: the same losses, as those rows hide."""
    losses = []
    for vocab_size in (words_size, words_size + 64):
        words = tiny_crab.tokenizer()
        llm = tiny_crab.plain_llm(words_size + 64)
        if vocab_size == words_size:
            kept = llm.get_input_embeddings().weight.detach()[:words_size].clone()
            llm.resize_token_embeddings(words_size)
            assert torch.equal(llm.get_output_embeddings().weight, kept)
        else:
            with torch.no_grad():  # rows beyond our tokens, which nothing hides
                llm.get_input_embeddings().weight[words_size + 17 :] = 0
        model = build_model(tiny_crab.config("lora"), words, llm=llm)
        collate = Collator(model.config, words, model.table)
        batch = collate([tiny_crab.example(0)])
        logits = model.logits(model.hidden_states(model.embed(batch), batch))
        losses.append(logits[..., : words_size + 17])
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)


@pytest.fixture
def words_size() -> int:
    return len(tiny_crab.tokenizer())


def test_tiny_preset_is_tiny() -> None:
    words = tiny_crab.tokenizer()
    model = build_model(tiny(), words)
    assert sum(p.numel() for p in model.parameters()) < 6_000_000


def test_config_survives_json_and_refuses_what_it_does_not_know() -> None:
    config = tiny()
    assert CrabConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="rank"):
        AdapterConfig.model_validate({"rank": 8})
    with pytest.raises(ValueError, match="either path or architecture"):
        LlmConfig()
    with pytest.raises(ValueError, match="multiple"):
        config.video.model_validate(config.video.model_dump() | {"num_heads": 7})


def test_language_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    words = tiny_crab.tokenizer()
    llm = tiny_llama(len(words), seed=3)
    llm.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = load_llm(str(tmp_path))
    ids = torch.arange(8).unsqueeze(0)
    llm.eval()
    assert torch.equal(loaded(input_ids=ids).logits, llm(input_ids=ids).logits)
    assert load_tokenizer(str(tmp_path)).get_vocab() == words.get_vocab()
