"""The adapter's numbers: against PEFT's LoRA, against the equation written as a sum, and its laws.

Tolerances are stated where they are used, with the worst value measured (torch 2.13 CPU).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from crab.adapter import InteractionHeads, InteractionLoraConfig, record_routing

IN, OUT, RANK, ALPHA = 24, 40, 4, 10


class OneLinear(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = nn.Linear(IN, OUT, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def adapted(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> nn.Module:
    """One adapted linear layer with B filled at random (at the start B is zero, which hides
    errors).
    """
    torch.manual_seed(seed)
    config = InteractionLoraConfig(
        **{
            "num_heads": 3,
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
            "target_modules": ["lin"],
            **settings,
        }
    )
    model = get_peft_model(OneLinear(dtype), config)
    with torch.no_grad():
        heads_of(model).weight_b.normal_()
    return model


def heads_of(model: nn.Module) -> InteractionHeads:
    return next(m for m in model.modules() if isinstance(m, InteractionHeads))


def base_of(model: nn.Module) -> nn.Linear:
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


def tokens(dtype: torch.dtype, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, IN, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def worst_relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value that was wanted."""
    return ((got - want).abs().max() / want.abs().max()).item()


def peft_lora_twin(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """PEFT's own LoRA with the weights of a one-head adapter."""
    heads, base = heads_of(model), base_of(model)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["lin"])
    twin = get_peft_model(OneLinear(base.weight.dtype), config)
    layer = twin.base_model.model.lin
    with torch.no_grad():
        layer.base_layer.load_state_dict(base.state_dict())
        layer.lora_A["default"].weight.copy_(heads.shared_a)
        layer.lora_B["default"].weight.copy_(heads.weight_b)
    return twin


# Measured worst: fp64 3.6e-16, fp32 1.7e-7.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_head_is_pefts_lora(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    model = adapted(dtype, num_heads=1, lora_dropout=dropout)
    twin = peft_lora_twin(model, dropout)
    x, x_twin = tokens(dtype, 2, 7), tokens(dtype, 2, 7)
    torch.manual_seed(5)
    got = model(x)
    torch.manual_seed(5)
    want = twin(x_twin)
    got.square().sum().backward()
    want.square().sum().backward()

    layer = twin.base_model.model.lin
    heads = heads_of(model)
    assert worst_relative(got, want) <= tolerance
    assert worst_relative(x.grad, x_twin.grad) <= tolerance
    assert (
        worst_relative(heads.weight_ar.grad[:RANK], layer.lora_A["default"].weight.grad)
        <= tolerance
    )
    assert worst_relative(heads.weight_b.grad, layer.lora_B["default"].weight.grad) <= tolerance
    assert (
        heads.weight_ar.grad[RANK:].abs().max() == 0
    )  # softmax of one logit is 1 whatever the router says


def equation(
    x: Tensor,
    base: nn.Linear,
    a: Tensor,
    router: Tensor,
    b: Tensor,
    scale: float,
    temperature: float,
) -> Tensor:
    """y = W0 x + s sum_i softmax(R x / T)_i B_i A x, head by head."""
    y = base(x)
    gates = torch.softmax(x @ router.t() / temperature, dim=-1)
    for i in range(b.shape[0]):
        y = y + scale * gates[..., i : i + 1] * (x @ a.t() @ b[i].t())
    return y


# Measured worst: fp64 3.1e-14, fp32 1.1e-6 (both in gradients of a cube).
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_heads", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(), (6,), (2, 6), (2, 3, 6)])
def test_fused_product_is_the_sum_over_heads(
    dtype: torch.dtype, tolerance: float, num_heads: int, shape: tuple[int, ...]
) -> None:
    model = adapted(dtype, num_heads=num_heads, router_temperature=0.7)
    heads = heads_of(model)
    parts = [heads.shared_a, heads.router, heads.heads_b]
    a, router, b = (p.detach().clone().requires_grad_() for p in parts)
    x, x_sum = tokens(dtype, *shape), tokens(dtype, *shape)
    got = model(x)
    want = equation(x_sum, base_of(model), a, router, b, scale=ALPHA / RANK, temperature=0.7)
    got.pow(3).sum().backward()
    want.pow(3).sum().backward()

    assert got.shape == (*shape, OUT)
    assert worst_relative(got, want) <= tolerance
    assert worst_relative(x.grad, x_sum.grad) <= tolerance
    assert worst_relative(heads.weight_ar.grad[:RANK], a.grad) <= tolerance
    grad_b = heads.weight_b.grad.unflatten(1, (num_heads, RANK)).transpose(0, 1)
    assert worst_relative(grad_b, b.grad) <= tolerance
    if num_heads > 1:
        assert worst_relative(heads.weight_ar.grad[RANK:], router.grad) <= tolerance


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_match_finite_differences(dropout: float) -> None:
    model = adapted(lora_dropout=dropout)
    heads = heads_of(model)
    x = tokens(torch.float64, 2, 3)

    def run(x: Tensor, ar: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same dropout mask in every evaluation
        return torch.func.functional_call(
            heads, {"weight_ar": ar, "weight_b": b}, (x, base_of(model)(x))
        )

    assert torch.autograd.gradcheck(run, (x, heads.weight_ar, heads.weight_b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = OneLinear(dtype)
    x = tokens(dtype, 4, 9)
    want = plain(x)
    model = get_peft_model(plain, InteractionLoraConfig(target_modules=["lin"]))
    assert torch.equal(model(x), want)
    assert torch.equal(model.eval()(x), want)


def test_a_and_router_start_by_their_own_fan_in_and_b_at_zero() -> None:
    torch.manual_seed(0)
    heads = InteractionHeads(400, 100, InteractionLoraConfig(num_heads=16, r=32))
    bound = 400**-0.5  # Kaiming-uniform with a = sqrt(5) is U(-1, 1) / sqrt(fan_in)
    for rows in (heads.shared_a, heads.router):
        assert rows.abs().max() <= bound
        assert rows.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert heads.weight_b.abs().max() == 0


def test_gates_are_a_distribution_over_heads_for_every_token() -> None:
    model = adapted(torch.float32, num_heads=4)
    with record_routing(model) as record:
        model(tokens(torch.float32, 3, 5))
    (gates,) = next(iter(record.values()))
    assert gates.shape == (3, 5, 4)
    assert (gates > 0).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 5), rtol=0, atol=1e-6)
    assert gates.flatten(0, 1).std(0).min() > 0  # tokens are routed one by one, not alike


def test_a_token_does_not_see_its_neighbours() -> None:
    """Fails for a router that averages over the batch or over time. Measured worst 1.8e-15
    (blocking of the GEMM).
    """
    model = adapted()
    x = tokens(torch.float64, 3, 6).detach()
    want = model(x)[1, 2]
    others = tokens(torch.float64, 3, 6, seed=9).detach() * 100
    others[1, 2] = x[1, 2]
    torch.testing.assert_close(model(others)[1, 2], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x[1, 2]), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x.flip(0, 1))[1, 3], want, rtol=0, atol=1e-12)


def gates_at(temperature: float) -> Tensor:
    model = adapted(router_temperature=temperature)
    with record_routing(model) as record:
        model(tokens(torch.float64, 50))
    return next(iter(record.values()))[0]


def test_temperature_sharpens_and_flattens() -> None:
    cold, usual, hot = gates_at(1e-4), gates_at(1.0), gates_at(1e4)
    best = torch.nn.functional.one_hot(usual.argmax(-1), 3).float()
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 3), rtol=0, atol=1e-3)
    assert (cold - best).abs().max() < 1e-3
    entropies = [-(g.clamp_min(1e-30).log() * g).sum(-1).mean() for g in (cold, usual, hot)]
    assert entropies == sorted(entropies)


def test_dropout_is_drawn_once_for_all_heads() -> None:
    """With equal heads the mixture is one head, whatever the gates: true only if every head sees
    the same mask.
    """
    model = adapted(lora_dropout=0.5)
    heads = heads_of(model)
    with torch.no_grad():
        heads.weight_b.copy_(heads.weight_b[:, :RANK].repeat(1, 3))
    x = tokens(torch.float64, 2, 5)
    torch.manual_seed(7)
    got = model(x)
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x, 0.5)
    delta = ALPHA / RANK * dropped @ heads.shared_a.t() @ heads.weight_b[:, :RANK].t()
    torch.testing.assert_close(got, base_of(model)(x) + delta, rtol=1e-12, atol=1e-12)


def test_the_router_sees_the_input_without_dropout_and_eval_has_none() -> None:
    model = adapted(lora_dropout=0.5)
    x = tokens(torch.float64, 2, 5)
    with record_routing(model) as record:
        noisy, noisy_again = model(x), model(x)
        model.eval()
        still, still_again = model(x), model(x)
    gates = next(iter(record.values()))
    assert all(torch.equal(g, gates[0]) for g in gates)
    assert not torch.equal(noisy, noisy_again)
    assert torch.equal(still, still_again)


def test_low_precision_base_keeps_fp32_adapter_and_its_own_dtype_out() -> None:
    """bf16 base: the result is the fp32 mixture rounded once. Tolerance: one bf16 rounding, 2^-8
    of the value.
    """
    model = adapted(torch.bfloat16)
    assert heads_of(model).weight_ar.dtype == heads_of(model).weight_b.dtype == torch.float32
    x = tokens(torch.bfloat16, 2, 5)
    got = model(x)
    assert got.dtype == torch.bfloat16
    heads = heads_of(model)
    with torch.no_grad():
        gates = torch.softmax(x.float() @ heads.router.t(), -1)
        code = x.float() @ heads.shared_a.t()
        mixed = torch.einsum("...n,...r,nor->...o", gates, code, heads.heads_b) * ALPHA / RANK
        want = base_of(model)(x).float() + mixed
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-6)


def test_bf16_adapter_still_routes_in_fp32() -> None:
    """What DeepSpeed's bf16 makes of the adapter. Gates rounded to bf16 miss 1 by up to 4e-3."""
    model = adapted(torch.float32).to(torch.bfloat16)
    with record_routing(model) as record:
        y = model(tokens(torch.bfloat16, 200))
    (gates,) = next(iter(record.values()))
    torch.testing.assert_close(gates.sum(-1), torch.ones(200), rtol=0, atol=1e-6)
    y.sum().backward()
    assert heads_of(model).weight_ar.grad.isfinite().all()


def test_autocast_bf16_trains_and_stays_near_fp32() -> None:
    """Measured worst 7e-3 of the largest output; bf16 has 8 bits, three products in a row."""
    model = adapted(torch.float32)
    x = tokens(torch.float32, 2, 5)
    want = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert worst_relative(got.float(), want) < 3e-2
    got.float().square().sum().backward()
    grads = [heads_of(model).weight_ar.grad, heads_of(model).weight_b.grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().max() > 0 for g in grads)
