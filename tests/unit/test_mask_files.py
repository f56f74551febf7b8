"""Mask files of all kinds that AVSBench, Ref-AVS and AV-Shapes have, as arrays."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crab.masks import read_class_map, read_mask, resize
from crab.samples import MaskRef

INDICES = np.array([[0, 1, 2], [7, 0, 2]], np.uint8)
COLOURS = np.array([[0, 0, 0], [64, 128, 128], [0, 0, 1]], np.uint8)


def save(folder: Path, image: Image.Image, **fields: object) -> MaskRef:
    path = folder / "mask.png"
    image.save(path)
    return MaskRef.model_validate({"frame": 0, "file": str(path)} | fields)


def indexed() -> Image.Image:
    """An index map with a palette, in which index 0 has a bright colour and index 2 is black."""
    image = Image.fromarray(INDICES).convert("P")
    image.putpalette([255, 255, 255, 9, 9, 9, 0, 0, 0] + [5] * 3 * 253)
    image.putdata(INDICES.ravel().tolist())
    return image


def test_every_pixel_that_is_not_0_belongs_to_the_mask(tmp_path: Path) -> None:
    for image in (
        Image.fromarray(INDICES),
        indexed(),
        Image.fromarray(INDICES > 0),
        Image.fromarray(INDICES.astype(np.uint16)),
    ):
        mask = read_mask(save(tmp_path, image))
        assert mask.dtype == bool
        assert (mask == (INDICES > 0)).all()


def test_a_pixel_of_any_colour_but_black_belongs_to_the_mask(tmp_path: Path) -> None:
    pixels = COLOURS[[[0, 1], [2, 0]]]
    assert read_mask(save(tmp_path, Image.fromarray(pixels))).tolist() == [
        [False, True],
        [True, False],
    ]
    # An opaque alpha channel does not make black a part of the mask.
    opaque = np.concatenate([pixels, np.full((2, 2, 1), 255, np.uint8)], -1)
    assert read_mask(save(tmp_path, Image.fromarray(opaque))).tolist() == [
        [False, True],
        [True, False],
    ]
    grey = np.stack([INDICES, np.full_like(INDICES, 255)], -1)
    assert (read_mask(save(tmp_path, Image.fromarray(grey))) == (INDICES > 0)).all()


@pytest.mark.parametrize("values", [(2,), (1, 7), (0,), (200,), ()])
def test_a_mask_of_chosen_values(tmp_path: Path, values: tuple[int, ...]) -> None:
    mask = read_mask(save(tmp_path, indexed(), values=values))
    assert mask.tolist() == [[value in values for value in row] for row in INDICES.tolist()]


def test_an_empty_choice_is_an_empty_mask_in_a_file_of_colours_too(tmp_path: Path) -> None:
    ref = save(tmp_path, Image.fromarray(COLOURS[[[0, 1]]]), values=())
    assert read_mask(ref, 4).tolist() == [[False] * 4] * 4


def test_a_class_map_keeps_all_classes_or_the_chosen_ones(tmp_path: Path) -> None:
    for image in (Image.fromarray(INDICES), indexed()):
        every = read_class_map(save(tmp_path, image))
        assert every.dtype == np.uint8
        assert (every == INDICES).all()
        assert read_class_map(save(tmp_path, image, values=(2, 7))).tolist() == [
            [0, 0, 2],
            [7, 0, 2],
        ]
        assert not read_class_map(save(tmp_path, image, values=())).any()


def test_colours_are_read_by_the_palette_of_avsbench(tmp_path: Path) -> None:
    colours = np.array(
        [[[0, 0, 0], [128, 0, 0], [0, 128, 0]], [[64, 128, 128], [0, 64, 0], [0, 0, 0]]]
    )
    ref = save(tmp_path, Image.fromarray(colours.astype(np.uint8)))
    # PASCAL VOC's colours: aeroplane 1, bicycle 2, motorbike 14, potted plant 16.
    assert read_class_map(ref).tolist() == [[0, 1, 2], [14, 16, 0]]
    assert read_class_map(ref.model_copy(update={"values": (2, 14)})).tolist() == [
        [0, 0, 2],
        [14, 0, 0],
    ]
    with pytest.raises(ValueError, match=r"mask\.png is a colour image"):
        read_mask(ref.model_copy(update={"values": (1,)}))


def test_colours_of_another_palette_are_refused_unless_it_is_given(tmp_path: Path) -> None:
    classes = np.array([[2, 1, 0], [0, 0, 1]])
    ref = save(tmp_path, Image.fromarray(COLOURS[classes]))
    assert (read_class_map(ref, palette=COLOURS.tolist()) == classes).all()
    assert read_class_map(ref, 6, palette=COLOURS.tolist()).shape == (6, 6)
    for palette in (None, COLOURS[:2].tolist()):
        with pytest.raises(
            ValueError, match=r"mask\.png: colour \(0, 0, 1\) is not in the palette"
        ):
            read_class_map(ref, palette=palette)


def test_a_palette_is_not_used_where_the_file_has_class_numbers(tmp_path: Path) -> None:
    ref = save(tmp_path, Image.fromarray(INDICES))
    assert (read_class_map(ref, palette=COLOURS.tolist()) == INDICES).all()


def test_class_numbers_above_255_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 256]], np.uint16))
    with pytest.raises(ValueError, match=r"mask\.png: class number 256"):
        read_class_map(save(tmp_path, image))


def test_resizing_picks_pixels_and_does_not_blend() -> None:
    columns = resize(np.repeat([[0, 9, 0, 200]], 4, 0).astype(np.uint8), 8)
    assert (columns == [0, 0, 9, 9, 0, 0, 200, 200]).all()
    assert resize(np.eye(8, dtype=bool), 4).dtype == bool
    wide = np.random.default_rng(0).choice(np.array([0, 3, 250], np.uint8), (540, 720))
    small = resize(wide, 224)
    assert set(np.unique(small)) == {0, 3, 250}
    rows, columns = (((np.arange(224) + 0.5) * length / 224).astype(int) for length in wide.shape)
    assert (small == wide[np.ix_(rows, columns)]).all()


def test_masks_are_read_at_the_size_asked_for(tmp_path: Path) -> None:
    big: NDArray[np.uint8] = np.kron(INDICES, np.ones((4, 4), np.uint8))
    ref = save(tmp_path, Image.fromarray(big))
    assert (read_mask(ref, 6) == np.kron(INDICES > 0, np.ones((3, 2), bool))).all()
    assert set(np.unique(read_class_map(ref, 5))) <= {0, 1, 2, 7}


def test_a_url_is_read_as_a_path_is(tmp_path: Path) -> None:
    ref = save(tmp_path, Image.fromarray(INDICES))
    assert (
        read_mask(ref.model_copy(update={"file": Path(ref.file).as_uri()})) == (INDICES > 0)
    ).all()


def test_errors_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        read_mask(MaskRef(frame=0, file=str(broken)))
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_class_map(MaskRef(frame=0, file=str(tmp_path / "gone.png")))


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_png_is_told_by_name(tmp_path: Path, cut: bool) -> None:
    ref = save(tmp_path, Image.fromarray(np.arange(10_000, dtype=np.uint8).reshape(100, 100)))
    data = bytearray(Path(ref.file).read_bytes())
    if cut:
        del data[len(data) // 2 :]
    else:  # a chunk whose kind is no letters, in place of the pixels
        at = data.index(b"IDAT")
        data[at : at + 4] = b"\x00\x01\x02\x03"
    Path(ref.file).write_bytes(data)
    with pytest.raises(ValueError, match=r"mask\.png cannot be read as an image"):
        read_mask(ref)
