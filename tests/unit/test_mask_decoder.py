"""Mask decoder and mask loss by themselves: shapes, gradients, independence of frames, and that it can draw."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_crab
import torch
from torch import Tensor

from crab.model.config import MaskDecoderConfig, paper, tiny
from crab.model.mask_decoder import MaskDecoder, fourier_positions
from crab.model.mask_loss import DICE_SMOOTHING, binary_loss, class_loss, mask_loss

WIDTH = 10  # of the language model


def small(**changes: object) -> MaskDecoderConfig:
    settings = tiny_crab.config().masks
    assert settings is not None
    return settings.model_copy(update=changes)


def decoder(**changes: object) -> MaskDecoder:
    torch.manual_seed(0)
    return MaskDecoder(small(**changes), WIDTH)


def inputs(num_groups: int, num_frames: int, grid: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (num_frames, grid * grid, tiny_crab.VIDEO_SIZE)
    features = {name: torch.randn(shape, generator=generator) for name in ("layer_2", "layer_4")}
    return torch.randn(num_groups, 6, WIDTH, generator=generator), features


@pytest.mark.parametrize("grid", [2, 3, 14])
def test_sizes_come_from_the_config_whatever_the_grid(grid: int) -> None:
    prompts, features = inputs(2, 3, grid)
    binary, classes = decoder()(prompts, features, torch.tensor([0, 1, 1]))
    assert binary.shape == (3, 16, 16)
    assert classes.shape == (3, tiny_crab.NUM_CLASSES, 16, 16)


def test_presets_have_the_published_sizes() -> None:
    settings = paper().masks
    assert settings is not None
    with torch.device("meta"):
        model = MaskDecoder(settings, 4096)
        features = {name: torch.zeros(2, 256, 1024) for name in ("layer_14", "layer_22")}
        binary, classes = model(torch.zeros(1, 6, 4096), features, torch.zeros(2).long())
    assert binary.shape == (2, 112, 112)
    assert classes.shape == (2, 71, 112, 112)
    assert model.query_generator.queries.shape == (300, 256)
    small_one = tiny().masks
    assert small_one is not None
    assert sum(p.numel() for p in MaskDecoder(small_one, 192).parameters()) < 600_000


def test_a_number_of_tokens_that_is_no_square_is_refused() -> None:
    prompts, features = inputs(1, 1)
    wrong = {name: array[:, :15] for name, array in features.items()}
    with pytest.raises(ValueError, match="15 tokens"):
        decoder()(prompts, wrong, torch.tensor([0]))


@pytest.mark.parametrize(
    "change", [{"width": 18}, {"num_heads": 3}, {"tokens_per_scale": 2}, {"num_classes": 1}]
)
def test_sizes_that_do_not_fit_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"masks|num_classes"):
        MaskDecoderConfig.model_validate(small().model_dump() | change)


def test_all_frames_together_equal_one_by_one() -> None:
    """Measured worst difference 2e-7."""
    model = decoder()
    prompts, features = inputs(3, 5)
    group = torch.tensor([2, 0, 0, 1, 2])
    together = model(prompts, features, group)
    for frame in range(5):
        one = {name: array[frame : frame + 1] for name, array in features.items()}
        chosen = prompts[group[frame]].unsqueeze(0)
        alone = model(chosen, one, torch.tensor([0]))
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[frame], part[0], rtol=0, atol=2e-6)


def test_a_mask_depends_on_its_own_group_and_frame() -> None:
    model = decoder()
    prompts, features = inputs(2, 2)
    first = model(prompts, features, torch.tensor([0, 1]))[0]
    swapped = model(prompts.flip(0), features, torch.tensor([1, 0]))[0]
    torch.testing.assert_close(first, swapped)
    other = model(prompts, features, torch.tensor([1, 1]))[0]
    assert (first[0] - other[0]).abs().max() > 1e-3
    torch.testing.assert_close(first[1], other[1])


@pytest.mark.parametrize("token", range(6))
def test_every_mask_token_counts(token: int) -> None:
    model = decoder()
    prompts, features = inputs(1, 1)
    changed = prompts.clone()
    changed[0, token] += 3
    before = model(prompts, features, torch.tensor([0]))[0]
    assert (model(changed, features, torch.tensor([0]))[0] - before).abs().max() > 1e-4


def test_every_parameter_has_a_gradient_scalars_included() -> None:
    model = decoder()
    prompts, features = inputs(2, 2)
    binary, classes = model(prompts, features, torch.tensor([0, 1]))
    (binary.square().sum() + classes.square().sum()).backward()
    # A key's bias shifts all scores of a softmax alike, so its gradient is zero but for rounding.
    silent = [
        name
        for name, p in model.named_parameters()
        if not (p.grad is not None and p.grad.any()) and not name.endswith("k_proj.bias")
    ]
    # One prompt to attend to: its weight is 1 whatever query and key are.
    assert all("prompt_attention.q_proj" in n or "prompt_attention.k_proj" in n for n in silent)
    assert {"token_weights", "scale_weights", "level_embeddings", "no_mask_embedding"} <= {
        name for name, _ in model.named_parameters()
    }


def test_gradients_equal_differences() -> None:
    """Central differences in float64 on a few values of each kind of parameter."""
    model = decoder(output_size=8).double()
    prompts, features = inputs(2, 2, 2)
    features = {name: array.double() for name, array in features.items()}
    target = (torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3)) > 0).to(torch.uint8)

    def loss() -> Tensor:
        binary, classes = model(prompts.double(), features, torch.tensor([0, 1]))
        semantic = torch.tensor([False, True])
        sample = torch.tensor([0, 0])
        return mask_loss(binary, classes, target, semantic, sample, 1, small()).sum()

    loss().backward()
    names = ("token_weights", "scale_weights", "level_embeddings", "no_mask_embedding")
    chosen = dict(model.named_parameters())
    for name in (*names, "query_generator.queries", "coarse.neck.0.weight", "fine.upsample.weight"):
        flat, gradient = chosen[name].detach().view(-1), chosen[name].grad
        assert gradient is not None
        for index in (0, flat.numel() - 1):
            old, step = float(flat[index]), 1e-6
            flat[index] = old + step
            above = float(loss())
            flat[index] = old - step
            below = float(loss())
            flat[index] = old
            expected = float(gradient.view(-1)[index])
            assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_the_coarse_maps_steer_the_fine_scale() -> None:
    """With the coarse logits left out of the sum, its transformer is still reached through the fine scale."""
    model = decoder()
    prompts, features = inputs(1, 1)
    with torch.no_grad():
        model.scale_weights.copy_(torch.tensor([0.0, 1.0]))
    model(prompts, features, torch.tensor([0]))[0].sum().backward()
    weight = model.coarse.query_mlp.proj_out.weight
    assert weight.grad is not None
    assert weight.grad.any()


def test_every_layer_of_the_query_generator_counts() -> None:
    """In Crab's release each layer starts from the same input, so that only the last one acts."""
    model = decoder()
    prompts = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
    before = model.query_generator(prompts)
    assert (before[0] - before[1]).abs().max() > 1e-3
    with torch.no_grad():
        for parameter in model.query_generator.layers[0].parameters():
            parameter.zero_()
    assert (model.query_generator(prompts) - before).abs().max() > 1e-3


def test_positions_tell_places_apart_and_need_no_random_state() -> None:
    torch.manual_seed(5)
    first = decoder().frequencies
    torch.manual_seed(6)
    assert torch.equal(first, MaskDecoder(small(), WIDTH).frequencies)
    places = fourier_positions(14, first).flatten(1)
    assert places.shape == (16, 196)
    distance = torch.cdist(places.T, places.T) + 100 * torch.eye(196)
    assert distance.min() > 0.1


def test_works_in_bfloat16_with_a_loss_in_float32() -> None:
    model = decoder().to(torch.bfloat16)
    prompts, features = inputs(1, 2)
    binary, classes = model(prompts, features, torch.tensor([0, 0]))
    assert binary.dtype == classes.dtype == torch.bfloat16
    target = torch.ones(2, 16, 16, dtype=torch.uint8)
    semantic = torch.tensor([True, False])
    loss = mask_loss(binary, classes, target, semantic, torch.tensor([0, 0]), 1, small())
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_binary_loss_is_bce_and_half_of_dice() -> None:
    random = np.random.default_rng(0)
    logits, truth = random.normal(size=(3, 4, 4)), random.integers(0, 2, (3, 4, 4))
    truth[2] = 0
    drawn = 1 / (1 + np.exp(-logits))
    bce = -(truth * np.log(drawn) + (1 - truth) * np.log(1 - drawn)).mean((1, 2))
    overlap, total = (drawn * truth).sum((1, 2)), (drawn + truth).sum((1, 2))
    dice = 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    found = binary_loss(torch.tensor(logits), torch.tensor(truth).to(torch.uint8), small())
    np.testing.assert_allclose(found.numpy(), bce + 0.5 * dice, rtol=1e-12)
    perfect = torch.where(torch.tensor(truth) > 0, 50.0, -50.0)
    zero = binary_loss(perfect, torch.tensor(truth).to(torch.uint8), small())
    np.testing.assert_allclose(zero.numpy(), 0, atol=1e-6)


def test_class_loss_is_the_mean_cross_entropy_of_the_pixels() -> None:
    random = np.random.default_rng(0)
    logits, truth = random.normal(size=(2, 5, 3, 3)), random.integers(0, 5, (2, 3, 3))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.take_along_axis(shares, truth[:, None], axis=1)[:, 0]
    found = class_loss(torch.tensor(logits), torch.tensor(truth).to(torch.uint8))
    np.testing.assert_allclose(found.numpy(), -np.log(chosen).mean((1, 2)), rtol=1e-12)


def test_losses_are_summed_by_sample_each_with_its_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    binary = torch.randn(4, 3, 3, generator=generator)
    classes = torch.randn(4, 5, 3, 3, generator=generator)
    target = torch.randint(0, 2, (4, 3, 3), generator=generator).to(torch.uint8)
    semantic, sample = torch.tensor([False, True, False, True]), torch.tensor([2, 0, 2, 2])
    config = small(ce_weight=0.25)
    found = mask_loss(binary, classes, target, semantic, sample, 4, config)
    plain, classified = binary_loss(binary, target, config), 0.25 * class_loss(classes, target)
    expected = [classified[1], 0.0, plain[0] + plain[2] + classified[3], 0.0]
    torch.testing.assert_close(found, torch.tensor([float(e) for e in expected]))


@pytest.mark.parametrize("semantic", [False, True])
def test_it_can_draw(semantic: bool) -> None:
    """Places from the features, which object from the prompt: masks of two prompts on the same frames."""
    torch.manual_seed(0)
    grid, side = 6, 24
    config = small(width=32, num_queries=8, num_heads=4, output_size=side)
    model = MaskDecoder(config, WIDTH)
    random = np.random.default_rng(0)
    array = torch.from_numpy(tiny_crab.place_features(random, 2, grid))
    features = {name: array.repeat(2, 1, 1) for name in ("layer_2", "layer_4")}
    prompts, group = torch.randn(2, 6, WIDTH), torch.tensor([0, 0, 1, 1])
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc, box = (x - 8) ** 2 + (y - 9) ** 2 <= 36, (x > 11) & (x < 22) & (y > 4) & (y < 18)
    numbers = (2, 4) if semantic else (1, 1)
    target = torch.stack([disc * numbers[0], disc * numbers[0], box * numbers[1], box * numbers[1]])
    target = target.to(torch.uint8)
    flags, sample = torch.full((4,), semantic), torch.zeros(4).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for step in range(150):
        for values in optimizer.param_groups:
            values["lr"] = 3e-3 * (1 - step / 150)
        loss = mask_loss(*model(prompts, features, group), target, flags, sample, 1, config)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    binary, classes = model(prompts, features, group)
    drawn = classes.argmax(1) if semantic else (binary > 0).long()
    right = ((drawn == target) & (target > 0)).flatten(1).sum(1)
    either = ((drawn > 0) | (target > 0)).flatten(1).sum(1)
    assert (right / either).min() > 0.9
