"""Tokens, prompt and batch: what the model is given to read, and what it is asked to write."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_crab
import torch
from transformers import PreTrainedTokenizerFast

from crab.model.collate import Collator, Example
from crab.model.config import PromptConfig
from crab.model.llm import train_tokenizer
from crab.model.sequences import packed
from crab.model.tokens import NEW_TOKENS, NewEmbedding, TokenTable, add_new_tokens

LLAMA_2_STYLE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}[INST] <<SYS>>{{ system }}<</SYS>> {{ rest[0]['content'] }} [/INST]"
)


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return tiny_crab.tokenizer()


def collator(words: PreTrainedTokenizerFast, **prompt: object) -> Collator:
    config = tiny_crab.config("none")
    config = config.model_copy(
        update={"prompt": PromptConfig(max_length=256).model_copy(update=prompt)}
    )
    return Collator(config, words, add_new_tokens(words))


def read(collate: Collator, ids: torch.Tensor) -> str:
    """Text of a row with the expanded placeholders folded into one again."""
    folded: list[int] = []
    media = {*collate.table.video_ids, *collate.table.audio_ids}
    for token in ids.tolist():
        if not (token in media and folded and folded[-1] == token):
            folded.append(token)
    return str(collate.tokenizer.decode(folded))


@pytest.mark.parametrize("text", [*tiny_crab.texts()[:5], "a,b  (2 10)\n<x>", "räum 字 \t", ""])
def test_tokenizer_gives_back_every_text(words: PreTrainedTokenizerFast, text: str) -> None:
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert words.decode(ids) == text


def test_tokenizer_needs_room_for_all_bytes() -> None:
    with pytest.raises(ValueError, match="259"):
        train_tokenizer(["a"], vocab_size=100)


def test_new_tokens_take_the_ids_after_the_last(words: PreTrainedTokenizerFast) -> None:
    size = len(words)
    table = add_new_tokens(words)
    assert table.ids == tuple(range(size, size + len(NEW_TOKENS)))
    assert add_new_tokens(words) == table
    assert len(words) == size + len(NEW_TOKENS)
    for name, token_id in table.id_of.items():
        assert words(f"x{name}y", add_special_tokens=False)["input_ids"].count(token_id) == 1


def test_a_token_that_the_tokenizer_knows_keeps_its_id(words: PreTrainedTokenizerFast) -> None:
    words.add_tokens(["<audio>"], special_tokens=True)
    known = words.convert_tokens_to_ids("<audio>")
    table = add_new_tokens(words)
    assert table.id_of["<audio>"] == known
    assert len(set(table.ids)) == len(NEW_TOKENS)


def test_first_rows_depend_on_names_alone(words: PreTrainedTokenizerFast) -> None:
    table = add_new_tokens(words)
    torch.manual_seed(1)
    first = NewEmbedding(table, 16, 0.02).rows
    torch.manual_seed(2)
    shifted = TokenTable(names=table.names[::-1], ids=tuple(i + 7 for i in table.ids))
    second = NewEmbedding(shifted, 16, 0.02).rows
    assert torch.equal(first, second.flip(0))
    assert len(torch.unique(first, dim=0)) == len(NEW_TOKENS)
    assert 0.015 < float(first.std()) < 0.025


def test_prompt_names_the_media_that_are_there(words: PreTrainedTokenizerFast) -> None:
    collate = collator(words)
    batch = collate([tiny_crab.example(0), tiny_crab.example(0, streams="v")], with_target=False)
    both, silent = (read(collate, row[mask.bool()]) for row, mask in zip(
        batch["input_ids"], batch["attention_mask"], strict=True
    ))  # fmt: skip
    assert both == (
        "<s>This is a video:\n<video_start><video><video_end>\n"
        "This is an audio:\n<audio_start><audio><audio_end>\nDescribe the event.\n"
    )
    assert silent == "<s>This is a video:\n<video_start><video><video_end>\nDescribe the event.\n"


def test_placeholders_match_the_features(words: PreTrainedTokenizerFast) -> None:
    collate = collator(words)
    examples = [
        tiny_crab.example(0, num_frames=4, num_segments=2),
        tiny_crab.example(1, streams="a", num_segments=5),
        tiny_crab.example(2, streams="vi", num_frames=1),
    ]
    batch = collate(examples)
    video, image = collate.table.video_ids
    counts = [
        [int((row == token).sum()) for token in (video, image, *collate.table.audio_ids)]
        for row in batch["input_ids"]
    ]
    assert counts == [[4 * 3, 0, 2 * 3], [0, 0, 5 * 3], [1 * 3, 1 * 3, 0]]
    assert batch["video"].shape == (4 + 1 + 1, 5, tiny_crab.VIDEO_SIZE)
    assert batch["audio"].shape == (2 + 5, 6, tiny_crab.AUDIO_SIZE)
    frames = np.concatenate(
        [
            examples[0].features["video"]["layer_4"],
            examples[2].features["video"]["layer_4"],
            examples[2].features["image"]["layer_4"],
        ]
    )
    np.testing.assert_array_equal(batch["video"].numpy(), frames)


def test_labels_are_the_target_and_nothing_else(words: PreTrainedTokenizerFast) -> None:
    collate = collator(words)
    examples = [tiny_crab.example(index) for index in range(4)]
    batch = collate(examples)
    for index, example in enumerate(examples):
        labelled = batch["labels"][index] != -100
        written = batch["labels"][index][labelled]
        reasoning = f"{example.sample.reasoning} " if example.sample.reasoning else ""
        assert words.decode(written) == f"{reasoning}{example.sample.answer}</s>"
        assert torch.equal(batch["input_ids"][index][labelled], written)
        assert labelled[-len(written) :].all()  # at the right end: padding is on the left
        assert collate.num_target_tokens(example.sample) == len(written)


def test_answer_alone_where_reasoning_is_not_wanted(words: PreTrainedTokenizerFast) -> None:
    collate = collator(words, include_reasoning=False)
    labels = collate([tiny_crab.example(1)])["labels"][0]
    text = words.decode(labels[labels != -100])
    assert text == f"{tiny_crab.sample(1).answer}</s>"


def test_padding_is_left_and_positions_start_at_the_first_token(
    words: PreTrainedTokenizerFast,
) -> None:
    batch = collator(words)([tiny_crab.example(0, num_frames=1), tiny_crab.example(2)])
    for mask, position in zip(batch["attention_mask"], batch["position_ids"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert position[-length:].tolist() == list(range(length))


def test_packed_samples_are_the_single_ones_one_after_the_other(
    words: PreTrainedTokenizerFast,
) -> None:
    collate = collator(words)
    examples = [tiny_crab.example(0, num_frames=1), tiny_crab.example(2), tiny_crab.example(1)]
    singles, padded = [collate([example]) for example in examples], collate(examples)
    batch = collate(examples, pack=True)
    assert batch.keys() == padded.keys() - {"attention_mask"} | {"lengths"}
    assert batch["lengths"].tolist() == [single["input_ids"].shape[1] for single in singles]
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles], dim=1))
    for name in ("video", "audio"):
        assert torch.equal(batch[name], padded[name])


def test_an_answer_without_a_prompt_is_not_packed() -> None:
    """What stands before its first token is another sample, which must not learn to predict it."""
    with pytest.raises(ValueError, match="sample 1 of the batch is supervised at its first token"):
        packed([[1, 2], [3, 4]], [1, 0])


def test_generation_starts_from_the_prompt_of_training(words: PreTrainedTokenizerFast) -> None:
    collate = collator(words)
    trained = collate([tiny_crab.example(1)])
    prompt = collate([tiny_crab.example(1)], with_target=False)["input_ids"][0]
    assert torch.equal(trained["input_ids"][0][trained["labels"][0] == -100], prompt)


def test_chat_template_carries_the_system_text(words: PreTrainedTokenizerFast) -> None:
    words.chat_template = LLAMA_2_STYLE
    collate = collator(words, system="Be kind.")
    text = read(
        collate, collate([tiny_crab.example(0, streams="v")], with_target=False)["input_ids"][0]
    )
    assert text.startswith("<s>[INST] <<SYS>>Be kind.<</SYS>> This is a video:\n<video_start>")
    assert text.endswith("Describe the event. [/INST]")


def test_template_without_a_system_turn(words: PreTrainedTokenizerFast) -> None:
    words.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0]['content'] }}|"
    )
    collate = collator(words, system="Be kind.")
    text = read(
        collate, collate([tiny_crab.example(0, streams="v")], with_target=False)["input_ids"][0]
    )
    assert text.startswith("Be kind.\n\nThis is a video")


def test_a_sample_that_is_too_long_is_refused_by_name(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"sample-1.*max_length is 20"):
        collator(words, max_length=20)([tiny_crab.example(1)])


def with_video(layer: str, shape: tuple[int, int, int]) -> Example:
    return Example(sample=tiny_crab.sample(0), features={"video": {layer: np.ones(shape)}})


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(sample=tiny_crab.sample(0), features={}), "no video features"),
        (Example(sample=tiny_crab.sample(0, streams="a"), features={}), "no audio features"),
        (
            Example(
                sample=tiny_crab.sample(0), features={"video": {"layer_9": np.ones((1, 2, 12))}}
            ),
            r"layer_9.*reads 'layer_4'",
        ),
        (
            Example(
                sample=tiny_crab.sample(0), features={"video": {"layer_4": np.ones((1, 2, 13))}}
            ),
            r"\(1, 2, 13\).*12",
        ),
        (
            Example(
                sample=tiny_crab.sample(0), features={"video": {"layer_4": np.ones((0, 2, 12))}}
            ),
            r"\(0, 2, 12\)",
        ),
        (tiny_crab.example(0, instruction="What is <video> here?"), "instruction contains"),
        (tiny_crab.example(0, answer="it is <audio>"), "media token"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(
    words: PreTrainedTokenizerFast, example: Example, message: str
) -> None:
    with pytest.raises(ValueError, match=f"sample-0.*{message}"):
        collator(words)([example])


def test_an_empty_batch_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="at least one"):
        collator(words)([])
