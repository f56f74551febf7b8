"""AVSBench: which frames have labels, names and boxes by masks, colours, other data sets' files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.official_sets import read_source, write_csv, write_map

from crab.datasets.avsbench import CLASSES
from crab.masks import MASK_SIZE, VOC_COLOURS, read_class_map, read_mask
from crab.tasks import TASKS

HEADER = ["vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"]
DOG, CAT, MAN = CLASSES.index("dog"), CLASSES.index("cat"), CLASSES.index("man")


def write(folder: Path, *rows: tuple[str, str, str, str]) -> None:
    """(uid, a_obj, split, label)"""
    write_csv(folder / "metadata.csv", HEADER, [("v", uid, 0, 5, *rest) for uid, *rest in rows])


def test_the_classes_are_the_official_71() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 71
    # Checked with Crab's examples: the mower's map has 45, the man's 41.
    assert (CLASSES[0], CLASSES[45], CLASSES[41]) == ("background", "mower", "man")


def test_labelled_frames_of_each_part(tmp_path: Path) -> None:
    write(
        tmp_path,
        ("a", "dog", "train", "v1s"),
        ("b", "dog", "test", "v1s"),
        ("c", "dog_cat", "train", "v1m"),
        ("d", "dog", "val", "v2"),
    )
    samples, problems, _ = read_source("avsbench", tmp_path)
    counts: dict[tuple[str, str], int] = {}
    for sample in samples:
        key = (sample.clip, sample.task)
        counts[key] = counts.get(key, 0) + 1
        assert TASKS[sample.task].parse(sample.answer) is not None
    assert counts == {
        ("v1s/a", "s4"): 1,
        ("v1s/a", "avss"): 1,
        ("v1s/b", "s4"): 5,
        ("v1s/b", "avss"): 5,
        ("v1m/c", "ms3"): 5,
        ("v1m/c", "avss"): 5,
        ("v2/d", "avss"): 10,
    }
    assert len({sample.id for sample in samples}) == len(samples)
    # Without masks there are no boxes, and that is told once a video.
    assert [(p["line"], p["kind"]) for p in problems] == [(2, "left_out"), (3, "left_out")]
    ms3 = next(sample for sample in samples if sample.task == "ms3")
    assert " dog, cat <mask_start>" in ms3.answer
    assert ms3.image == str(tmp_path / "v1m" / "c" / "frames" / "0.jpg")
    assert ms3.masks[0].file == str(tmp_path / "v1m" / "c" / "labels_semantic" / "0.png")


def test_boxes_and_masks_agree(tmp_path: Path) -> None:
    write(tmp_path, ("a", "dog", "train", "v1s"))
    # 448 pixels wide: at 224 half of each.
    write_map(tmp_path / "AVS/v1s/a/labels_semantic/0.png", [(DOG, 40, 100, 200, 300)])
    samples, problems, _ = read_source("avsbench", tmp_path)
    by_task = {sample.task: sample for sample in samples}
    assert not problems
    assert by_task["arig"].label == {"event": "dog", "box": [20, 50, 100, 150], "second": None}
    x1, y1, x2, y2 = by_task["arig"].label["box"]
    box = np.zeros((MASK_SIZE, MASK_SIZE), bool)
    box[y1:y2, x1:x2] = True
    assert (read_mask(by_task["s4"].masks[0], MASK_SIZE) == box).all()
    assert (read_class_map(by_task["avss"].masks[0], MASK_SIZE) == box * DOG).all()
    assert by_task["avss"].label == {"num_classes": 71, "names": {str(DOG): "dog"}}


def test_names_are_those_in_the_mask_of_the_frame(tmp_path: Path) -> None:
    write(tmp_path, ("c", "dog_cat_man", "train", "v1m"))
    folder = tmp_path / "v1m/c/labels_semantic"
    write_map(folder / "0.png", [(DOG, 0, 0, 200, 200), (CAT, 300, 300, 400, 400)])
    write_map(folder / "1.png", [])
    # Less than a thousandth of the masked pixels is a slip of the brush.
    write_map(folder / "2.png", [(MAN, 0, 0, 400, 400), (CAT, 410, 410, 418, 418)])
    samples, _, _ = read_source("avsbench", tmp_path)
    answers = {
        sample.id: TASKS["ms3"].parse(sample.answer) for sample in samples if sample.task == "ms3"
    }
    assert [item.names for item in answers["avsbench/ms3/v1m/c/0"]] == [("cat", "dog")]
    assert answers["avsbench/ms3/v1m/c/1"] == ()
    assert [item.names for item in answers["avsbench/ms3/v1m/c/2"]] == [("man",)]


def test_colours_stand_in_for_class_numbers(tmp_path: Path) -> None:
    write(tmp_path, ("d", "dog", "test", "v2"))
    pixels = np.zeros((224, 224, 3), np.uint8)
    pixels[10:20, 30:50] = VOC_COLOURS[DOG]
    path = tmp_path / "v2/d/labels_rgb/0.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    samples, _, _ = read_source("avsbench", tmp_path)
    assert samples[0].masks[0].file == str(path)
    assert samples[0].label["names"] == {str(DOG): "dog"}
    assert np.unique(read_class_map(samples[0].masks[0])).tolist() == [0, DOG]


def test_colours_of_the_voc_map() -> None:
    assert VOC_COLOURS[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    # The colour of the clarinet in Crab's AVSS example.
    assert VOC_COLOURS[14] == (64, 128, 128)
    assert len(set(VOC_COLOURS)) == 256


def test_a_broken_mask_is_told_and_the_other_frames_are_kept(tmp_path: Path) -> None:
    write(tmp_path, ("c", "dog", "train", "v1m"))
    folder = tmp_path / "v1m/c/labels_semantic"
    for frame in range(5):
        write_map(folder / f"{frame}.png", [(DOG, 0, 0, 200, 200)])
    (folder / "1.png").write_bytes(b"no picture")
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    write_map(folder / "3.png", [(200, 0, 0, 200, 200)])
    samples, problems, _ = read_source("avsbench", tmp_path)
    assert [sample.id for sample in samples if sample.task == "ms3"] == [
        "avsbench/ms3/v1m/c/0",
        "avsbench/ms3/v1m/c/4",
    ]
    assert len(problems) == 6
    assert "class 200" in str(problems[-1]["reason"])


def test_a_png_that_breaks_in_a_later_chunk_is_told(tmp_path: Path) -> None:
    write(tmp_path, ("a", "dog", "train", "v1s"))
    path = tmp_path / "v1s/a/labels_semantic/0.png"
    path.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 70, (448, 448), np.uint8)
    Image.fromarray(noise).save(path)
    head, first, rest = path.read_bytes().split(b"IDAT", 2)
    path.write_bytes(head + b"IDAT" + first + b"!!!!" + rest)
    samples, problems, _ = read_source("avsbench", tmp_path)
    assert not samples
    assert {problem["kind"] for problem in problems} == {"problem"}
    assert "cannot be read" in str(problems[0]["reason"])


def test_ref_avs_is_told_apart(tmp_path: Path) -> None:
    write_csv(tmp_path / "metadata.csv", ["vid", "uid", "split", "fid", "exp"], [])
    with pytest.raises(ValueError, match="import it as ref-avs"):
        read_source("avsbench", tmp_path)


@pytest.mark.parametrize(
    "row", [("a", "dog", "none", "v1s"), ("a", "dog", "test", "v3"), ("", "dog", "test", "v2")]
)
def test_rows_that_do_not_fit(tmp_path: Path, row: tuple[str, str, str, str]) -> None:
    write(tmp_path, row)
    samples, problems, _ = read_source("avsbench", tmp_path)
    assert not samples
    assert problems[0]["line"] == 2


@pytest.mark.parametrize("first", [0, 1])
def test_the_official_class_list_counts_from_1_and_masks_from_0(tmp_path: Path, first: int) -> None:
    write(tmp_path, ("c", "dog", "train", "v1m"))
    write_map(tmp_path / "v1m/c/labels_semantic/0.png", [(DOG, 0, 0, 200, 200)])
    numbers = {name: number for number, name in enumerate(CLASSES, start=first)}
    (tmp_path / "label2idx.json").write_text(json.dumps(numbers))
    samples, problems, _ = read_source("avsbench", tmp_path)
    assert not problems
    by_id = {sample.id: sample for sample in samples}
    assert " dog <mask_start>" in by_id["avsbench/ms3/v1m/c/0"].answer
    assert by_id["avsbench/avss/v1m/c/0"].label["names"] == {str(DOG): "dog"}


def test_a_class_list_with_another_background_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    names = [*CLASSES[1:], CLASSES[0]]
    (tmp_path / "label2idx.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    with pytest.raises(ValueError, match="background first"):
        read_source("avsbench", tmp_path)


def test_a_wrong_class_list_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "label2idx.json").write_text('{"background": 1, "dog": 2}')
    with pytest.raises(ValueError, match="71 classes numbered from 0"):
        read_source("avsbench", tmp_path)
