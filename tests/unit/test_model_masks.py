"""Masks through the whole model: batches, loss, generation and what is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_crab
import torch

from crab.masks import read_class_map, read_mask
from crab.model.artifact import load_model, save_model
from crab.model.build import build_model
from crab.model.collate import Collator, Example
from crab.model.crab_model import CrabModel
from crab.model.generate import generate
from crab.model.initial import load_initial, save_initial
from crab.predict import predict
from crab.samples import MaskRef
from crab.tasks.mask_answer import NOTHING
from crab.train import mask_frames, optimizer_step, parameter_groups, supervised_tokens

MASKED = {"mask_coarse", "mask_fine", "mask_group", "mask_sample", "mask_target", "mask_semantic"}


def mixed(folder: Path) -> list[Example]:
    """Binary masks, no masks, classes, and a sample whose answer is that there is nothing."""
    return [
        tiny_crab.mask_example(folder, 0),
        tiny_crab.example(1),
        tiny_crab.mask_example(folder, 2, task="avss"),
        tiny_crab.mask_example(folder, 3, answer=NOTHING, masks=()),
    ]


def test_the_frames_in_spans_are_drawn_each_by_its_group(tmp_path: Path) -> None:
    _, _, collate = tiny_crab.model()
    examples = mixed(tmp_path)
    batch = collate(examples)
    # Frame 2 has a true mask (an empty one) and lies in no span: it carries no loss.
    assert batch["mask_group"].tolist() == [0, 0, 1, 2, 2, 3]
    assert batch["mask_sample"].tolist() == [0, 0, 0, 2, 2, 2]
    assert batch["mask_semantic"].tolist() == [False] * 3 + [True] * 3
    for name, layer in (("mask_coarse", "layer_2"), ("mask_fine", "layer_4")):
        rows = [examples[i].features["video"][layer][[0, 1, 3]] for i in (0, 2)]
        np.testing.assert_array_equal(batch[name].numpy(), np.concatenate(rows))
    assert [collate.num_mask_frames(example.sample) for example in examples] == [3, 0, 3, 0]
    assert mask_frames(batch) == 6
    assert mask_frames(collate(examples[1:2])) == 0
    # The images are 32 pixels wide and the output is 16: two by two pixels a pixel.
    first, last = examples[0].sample.masks[0], examples[2].sample.masks[3]
    expected = read_mask(first).reshape(16, 2, 16, 2).mean((1, 3)) >= 0.5
    np.testing.assert_array_equal(batch["mask_target"][0].numpy(), expected)
    np.testing.assert_array_equal(batch["mask_target"][5].numpy(), read_class_map(last, 16))
    assert batch["mask_target"][5].max() == 4


def test_frames_without_a_true_mask_are_not_drawn(tmp_path: Path) -> None:
    """AVSBench's S4 labels the first frame of a train clip alone."""
    _, _, collate = tiny_crab.model()
    example = tiny_crab.mask_example(tmp_path, 0)
    refs = example.sample.masks[:1]
    batch = collate([tiny_crab.mask_example(tmp_path, 0, masks=refs)])
    assert batch["mask_group"].tolist() == [0]
    assert MASKED & collate([tiny_crab.mask_example(tmp_path, 0, masks=())]).keys() == set()


def test_half_of_a_pixel_makes_it_belong(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((32, 32), np.uint8)
    pixels[0, 0:2] = pixels[0:2, 4] = pixels[0, 8] = 1  # two, two and one of four
    Image.fromarray(pixels).save(tmp_path / "m.png")
    _, _, collate = tiny_crab.model()
    refs = [MaskRef(frame=0, file=str(tmp_path / "m.png"))]
    target = collate([tiny_crab.mask_example(tmp_path, 0, masks=refs)])["mask_target"][0]
    assert target.nonzero().tolist() == [[0, 0], [0, 2]]


def test_layers_are_asked_for_where_the_task_draws(tmp_path: Path) -> None:
    _, _, collate = tiny_crab.model()
    assert collate.layers(tiny_crab.sample(0))["video"] == ("layer_4",)
    wanted = collate.layers(tiny_crab.mask_example(tmp_path, 0).sample)
    assert wanted == {
        "video": ("layer_4", "layer_2"),
        "image": ("layer_4", "layer_2"),
        "audio": ("tokens",),
    }


def without(example: Example, layer: str) -> Example:
    video = {name: array for name, array in example.features["video"].items() if name != layer}
    return Example(sample=example.sample, features={**example.features, "video": video})


def test_what_cannot_be_drawn_is_refused_by_name(tmp_path: Path) -> None:
    model, _, collate = tiny_crab.model()
    good = tiny_crab.mask_example(tmp_path, 0)
    with pytest.raises(ValueError, match=r"ms3-0.*'layer_2'.*masks\.layers"):
        collate([without(good, "layer_2")])
    with pytest.raises(ValueError, match=r"ms3-0.*'layer_2'.*masks\.layers"):
        predict(model, collate, [without(good, "layer_2")], max_new_tokens=1)
    short = {name: array[:3] for name, array in good.features["video"].items()}
    with pytest.raises(ValueError, match=r"ms3-0.*frame 3.*3 frames"):
        collate([Example(sample=good.sample, features={**good.features, "video": short})])
    uneven = {**good.features["video"], "layer_2": good.features["video"]["layer_2"][:, :9]}
    with pytest.raises(ValueError, match=r"ms3-0.*expected the same"):
        collate([Example(sample=good.sample, features={**good.features, "video": uneven})])
    group = good.sample.answer
    with pytest.raises(ValueError, match=r"ms3-0.*whole groups"):
        collate([tiny_crab.mask_example(tmp_path, 0, answer=group.replace("<mask_2>", "", 1))])
    with pytest.raises(ValueError, match=r"ms3-0.*grammar"):
        collate([tiny_crab.mask_example(tmp_path, 0, answer=f"{group} {group}")])
    audio = Example(
        sample=tiny_crab.mask_example(tmp_path, 0, streams="a").sample,
        features={"audio": good.features["audio"]},
    )
    with pytest.raises(ValueError, match=r"ms3-0.*neither video nor image"):
        collate([audio])
    few = tiny_crab.config().masks
    assert few is not None
    settings = tiny_crab.config().model_copy(
        update={"masks": few.model_copy(update={"num_classes": 3})}
    )
    with pytest.raises(ValueError, match=r"avss-2.*class 3.*3"):
        Collator(settings, collate.tokenizer, collate.table)(
            [tiny_crab.mask_example(tmp_path, 2, task="avss")]
        )


def test_a_model_without_a_decoder_learns_the_text_alone(tmp_path: Path) -> None:
    model, _, collate = tiny_crab.model(masks=None)
    example = tiny_crab.mask_example(tmp_path, 0)
    batch = collate([without(example, "layer_2")])
    assert MASKED & batch.keys() == set()
    assert collate.num_mask_frames(example.sample) == 0
    output = model(batch)
    assert output["sample_mask_frames"].tolist() == [0]
    assert float(output["loss"]) == pytest.approx(
        float(output["sample_loss"][0] / output["sample_tokens"][0]), rel=1e-6
    )
    assert [n for n in model.trainable_parameters() if "mask_decoder" in n] == []
    assert predict(model, collate, [example], max_new_tokens=3)[0].masks is None
    with pytest.raises(ValueError, match="draws no masks"):
        model.draw(torch.zeros(1, 6, 48), batch)


def test_the_loss_is_text_plus_weighted_masks(tmp_path: Path) -> None:
    model, _, collate = tiny_crab.model()
    batch = collate(mixed(tmp_path))
    output = model(batch)
    text = output["sample_loss"].sum() / output["sample_tokens"].sum()
    masks = output["sample_mask_loss"].sum() / 6
    torch.testing.assert_close(output["loss"], text + masks)
    assert output["sample_mask_frames"].tolist() == [3, 0, 3, 0]
    assert (output["sample_mask_loss"] > 0).tolist() == [True, False, True, False]
    settings = model.config.masks
    assert settings is not None
    model.config = model.config.model_copy(
        update={"masks": settings.model_copy(update={"weight": 0.25})}
    )
    torch.testing.assert_close(model(batch)["loss"], text + 0.25 * masks)
    torch.testing.assert_close(model(batch, 10.0, 4.0)["loss"], output["sample_loss"].sum() / 10
                               + 0.25 * output["sample_mask_loss"].sum() / 4)  # fmt: skip


def test_the_mask_loss_reaches_decoder_and_language_side(tmp_path: Path) -> None:
    """Text has normaliser infinity: what moves is moved by the masks."""
    model, _, collate = tiny_crab.model()
    batch = collate([tiny_crab.mask_example(tmp_path, 0)])
    names = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameter_groups(names), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in names.items()}
    losses = []
    for _ in range(8):
        output = model(batch, float("inf"), 3.0)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(float(output["loss"].detach()))
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, parameter in names.items() if not torch.equal(parameter, before[name])}
    for part in ("mask_decoder.", "ilora_", "video_projector.", "new_embedding."):
        assert any(part in name for name in moved)
    for scalar in ("mask_decoder.scale_weights", "mask_decoder.token_weights"):
        assert scalar in moved
    # The output rows say which token comes, not what is drawn.
    assert "new_head.rows" not in moved


def test_micro_batches_add_up_to_the_whole(tmp_path: Path) -> None:
    """One part without any mask, one with masks of both kinds: float64."""
    model, _, collate = tiny_crab.model()
    model.double()
    examples = mixed(tmp_path)
    names = model.trainable_parameters()
    whole = collate(examples)
    model(whole)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in names.items()}
    assert expected["mask_decoder.binary_head.weight"].any()
    model.zero_grad()
    normalizers = float(supervised_tokens(whole)), float(mask_frames(whole))
    for part in (examples[:1], examples[1:2], examples[2:]):
        model(collate(part), *normalizers)["loss"].backward()
    for name, parameter in names.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12)


def test_neighbours_do_not_change_a_sample_s_mask_loss(tmp_path: Path) -> None:
    model, _, collate = tiny_crab.model()
    model.double().eval()
    examples = mixed(tmp_path)
    together = model(collate(examples))["sample_mask_loss"]
    alone = [model(collate([example]))["sample_mask_loss"][0] for example in examples]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-12)


def test_frames_of_another_collator_are_refused(tmp_path: Path) -> None:
    model, _, collate = tiny_crab.model()
    batch = collate([tiny_crab.mask_example(tmp_path, 0)])
    with pytest.raises(ValueError, match="group 2"):
        model(batch | {"mask_group": batch["mask_group"] + 1})


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A model that knows four samples by heart."""
    model, words, collate = tiny_crab.model()
    examples = mixed(tmp_path_factory.mktemp("masks"))
    batch = collate(examples)
    optimizer = torch.optim.AdamW(parameter_groups(model.trainable_parameters()))
    first = model(batch)
    for step in range(180):
        last = optimizer_step(model, [batch], optimizer, lr=1e-2 * (1 - step / 180))[0]
    assert float(last["sample_mask_loss"].sum()) < 0.2 * float(first["sample_mask_loss"].sum())
    return model.eval(), words, collate, examples


def test_one_generation_gives_text_and_masks_of_the_whole_clip(learnt: tuple) -> None:
    model, _, collate, examples = learnt
    predictions = predict(model, collate, examples, max_new_tokens=90, batch_size=3)
    for prediction, example in zip(predictions, examples, strict=True):
        assert prediction.text == f"{example.sample.reasoning} {example.sample.answer}".strip()
    binary, nothing, classes, none = [prediction.masks for prediction in predictions]
    assert nothing is None  # no mask task
    assert none is None  # no frame
    assert binary.frames == classes.frames == (0, 1, 2, 3)
    assert binary.values.shape == classes.values.shape == (4, 224, 224)
    assert (binary.values.dtype, classes.values.dtype) == (np.float16, np.uint8)
    assert not binary.values[2].any()
    assert not classes.values[2].any()
    for frame in (0, 1, 3):
        truth = read_mask(examples[0].sample.masks[frame], 224)
        drawn = binary.values[frame] > 0.5
        assert (drawn & truth).sum() / (drawn | truth).sum() > 0.85
        truth = read_class_map(examples[2].sample.masks[frame], 224)
        drawn = classes.values[frame]
        assert ((drawn == truth) & (truth > 0)).sum() / ((drawn > 0) | (truth > 0)).sum() > 0.85


def test_masks_do_not_depend_on_the_batch(learnt: tuple) -> None:
    model, _, collate, examples = learnt
    together = predict(model, collate, examples, max_new_tokens=90)
    for example, whole in zip(examples, together, strict=True):
        (alone,) = predict(model, collate, [example], max_new_tokens=90)
        assert alone.text == whole.text
        assert (alone.masks is None) == (whole.masks is None)
        if alone.masks is not None and whole.masks is not None:
            difference = alone.masks.values.astype(float) - whole.masks.values.astype(float)
            assert np.abs(difference).mean() < 1e-3


def test_prompts_in_generation_are_those_of_training(learnt: tuple) -> None:
    """What each mask token was chosen from is what the loss takes for the same text."""
    model, _, collate, examples = learnt
    batch = collate(examples, with_target=False)
    drawn = generate(model, batch, max_new_tokens=90, eos_id=collate.eos_id).drawn
    assert [len(states) for states in drawn] == [12, 0, 12, 0]
    taught = collate(examples)
    with torch.no_grad():
        hidden = model.hidden_states(model.embed(taught), taught)
    for row, states in enumerate(drawn):
        where = torch.isin(taught["labels"][row, 1:], model.drawn_ids)
        torch.testing.assert_close(states, hidden[row, :-1][where], rtol=1e-3, atol=1e-3)


def test_an_answer_that_cannot_be_read_has_no_masks(learnt: tuple) -> None:
    model, _, collate, examples = learnt
    cut = predict(model, collate, examples[:1], max_new_tokens=20)[0]
    assert not cut.finished
    assert cut.masks is None


def test_saved_and_loaded_again_it_draws_the_same(learnt: tuple, tmp_path: Path) -> None:
    model, words, collate, examples = learnt
    folder = save_model(model, words, tmp_path / "out")
    loaded, loaded_words = load_model(folder)
    again = Collator(loaded.config, loaded_words, loaded.table)
    for old, new in zip(
        predict(model, collate, examples[::2], max_new_tokens=90),
        predict(loaded, again, examples[::2], max_new_tokens=90),
        strict=True,
    ):
        assert old.text == new.text
        assert old.masks is not None
        assert new.masks is not None
        np.testing.assert_array_equal(old.masks.values, new.masks.values)


def parts(model: CrabModel) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if not n.startswith("llm.")}


def test_first_values_are_taken_where_given_and_checked(learnt: tuple, tmp_path: Path) -> None:
    model = learnt[0]
    given = {n: p for n, p in parts(model).items() if not n.startswith("audio_projector.")}
    folder = tmp_path / "initial"
    digest = save_initial(given, folder)
    config = tiny_crab.config().model_copy(update={"initial": str(folder)})
    words = tiny_crab.tokenizer()
    started = build_model(config, words)
    plain = parts(tiny_crab.model()[0])
    for name, value in parts(started).items():
        assert torch.equal(value, given[name] if name in given else plain[name])

    # What was trained from it does not need it any more.
    out = save_model(started, words, tmp_path / "out")
    shutil.move(folder, tmp_path / "elsewhere")
    assert load_model(out)[0].config.initial is None
    with pytest.raises(FileNotFoundError, match=r"initial\.safetensors"):
        build_model(config, tiny_crab.tokenizer())

    other = tiny_crab.model()[0]
    assert load_initial(other, tmp_path / "elsewhere") == digest
    file = tmp_path / "elsewhere" / "initial.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="digest"):
        load_initial(other, tmp_path / "elsewhere")


def test_first_values_of_another_model_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = tiny_crab.model()[0]
    before = {name: value.clone() for name, value in parts(model).items()}
    changed = {name: value + 1 for name, value in before.items()}
    save_initial(changed | {"new_head.rows": torch.zeros(2, 2)}, tmp_path)
    with pytest.raises(ValueError, match=r"1 tensors.*new_head\.rows"):
        load_initial(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in parts(model).items())
    with pytest.raises(ValueError, match=r"llm\.x"):
        save_initial({"llm.x": torch.zeros(1)}, tmp_path)
    with pytest.raises(ValueError, match="none"):
        save_initial({}, tmp_path)


def test_half_precision_first_values_are_widened(tmp_path: Path) -> None:
    model = tiny_crab.model()[0]
    save_initial(parts(model), tmp_path, dtype=torch.float16)
    expected = {name: value.half().float() for name, value in parts(model).items()}
    load_initial(model, tmp_path)
    assert all(torch.equal(expected[name], value) for name, value in parts(model).items())


def test_adapters_of_the_old_format_are_refused(tmp_path: Path) -> None:
    model, words, _ = tiny_crab.model()
    folder = save_model(model, words, tmp_path / "out")
    record = json.loads((folder / "crab.json").read_text())
    (folder / "crab.json").write_text(json.dumps(record | {"format": 1}))
    with pytest.raises(ValueError, match=r"format 1.*train the adapter again"):
        load_model(folder)
