"""The adapter's backward written by hand: against autograd through a plain loop over heads, and what it keeps.

The loop is the oracle: it computes head by head with ordinary operations, so autograd finds its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crab.adapter import InteractionHeads, InteractionLoraConfig
from crab.adapter.kernel import pack_bits, unpack_bits

TOKENS, IN, OUT, RANK, DROPOUT = 50, 24, 40, 4, 0.3
Grads = dict[str, Tensor | None]


def make_heads(
    dtype: torch.dtype, num_heads: int = 3, dropout: float = 0.0, size: tuple[int, int] = (IN, OUT)
) -> InteractionHeads:
    torch.manual_seed(0)
    config = InteractionLoraConfig(
        num_heads=num_heads, r=RANK, lora_alpha=6, lora_dropout=dropout, router_temperature=0.7
    )
    heads = InteractionHeads(*size, config)
    torch.nn.init.normal_(heads.weight_b)
    return heads.to(dtype)


def inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """x and base; both want gradients."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((*shape, IN), (*shape, OUT))
    x, base = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)
    return x.requires_grad_(), base.requires_grad_()


def loop(heads: InteractionHeads, x: Tensor, base: Tensor) -> Tensor:
    """The equation, head by head; dropout is torch's own."""
    p = heads.dropout if heads.training else 0.0
    dropped = torch.nn.functional.dropout(x, p)
    gates = torch.softmax(x @ heads.router.t() / heads.temperature, dim=-1)
    y = base
    for i, b in enumerate(heads.heads_b):
        y = y + heads.scaling * gates[..., i, None] * (dropped @ heads.shared_a.t() @ b.t())
    return y


def outcome(
    run: Callable[[Tensor, Tensor], Tensor], heads: InteractionHeads, x: Tensor, base: Tensor
) -> tuple[Tensor, Grads]:
    """Output and gradients of a loss in which no two outputs count alike."""
    named = {"x": x, "base": base, "ar": heads.weight_ar, "b": heads.weight_b}
    for tensor in named.values():
        tensor.grad = None
    torch.manual_seed(5)
    y = run(x, base)
    if y.requires_grad:
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        (y.double().pow(2) * weight).sum().backward()
    return y.detach(), {name: tensor.grad for name, tensor in named.items()}


def worst_relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value that was wanted."""
    return ((got - want).abs().max() / want.abs().max()).item()


# Measured worst: fp64 1.1e-15, fp32 6.7e-7.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("num_heads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_output_and_gradients_are_those_of_the_loop(
    dtype: torch.dtype, tolerance: float, dropout: float, num_heads: int, shape: tuple[int, ...]
) -> None:
    """With dropout too: from one seed both draw the same mask."""
    heads = make_heads(dtype, num_heads, dropout)
    x, base = inputs(dtype, *shape)
    got, got_grads = outcome(heads, heads, x, base)
    want, want_grads = outcome(lambda x, base: loop(heads, x, base), heads, x, base)
    assert worst_relative(got, want) <= tolerance
    for name, grad in want_grads.items():
        if name == "ar" and num_heads == 1:  # softmax of one logit: R's gradient is noise around 0
            assert got_grads["ar"][RANK:].abs().max() == 0
            got_grads["ar"], grad = got_grads["ar"][:RANK], grad[:RANK]
        assert worst_relative(got_grads[name], grad) <= tolerance, name


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_gradients_match_finite_differences_in_every_input(dropout: float) -> None:
    heads = make_heads(torch.float64, dropout=dropout)
    x, base = inputs(torch.float64, 2, 3)

    def run(x: Tensor, base: Tensor, ar: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same dropout mask in every evaluation
        weights = {"weight_ar": ar, "weight_b": b}
        return torch.func.functional_call(heads, weights, (x, base))

    assert torch.autograd.gradcheck(run, (x, base, heads.weight_ar, heads.weight_b))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=4)))
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_only_the_gradients_that_are_wanted_are_made(
    wanted: tuple[bool, ...], dropout: float
) -> None:
    heads = make_heads(torch.float64, dropout=dropout)
    x, base = inputs(torch.float64, 4)
    _, all_grads = outcome(heads, heads, x, base)
    for tensor, want in zip((x, base, heads.weight_ar, heads.weight_b), wanted, strict=True):
        tensor.requires_grad_(want)
    y, grads = outcome(heads, heads, x, base)
    assert y.shape == base.shape
    for (name, grad), want in zip(grads.items(), wanted, strict=True):
        assert (grad is not None) == want, name
        assert grad is None or torch.equal(grad, all_grads[name])


def test_no_tokens_are_no_trouble() -> None:
    for dropout in (0.0, DROPOUT):
        heads = make_heads(torch.float32, dropout=dropout)
        x, base = inputs(torch.float32, 2, 0)
        y, grads = outcome(heads, heads, x, base)
        assert y.shape == (2, 0, OUT)
        assert grads["ar"].abs().max() == grads["b"].abs().max() == 0
        assert grads["x"].shape == x.shape


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (3, 5), (2, 7, 9)])
def test_bits_survive_their_packing(shape: tuple[int, ...]) -> None:
    kept = torch.empty(shape, dtype=torch.uint8).bernoulli_(0.6)
    bits = pack_bits(kept)
    assert bits.nbytes == -(-kept.numel() // 8)
    assert torch.equal(unpack_bits(bits, kept.shape), kept)
    assert torch.equal(unpack_bits(pack_bits(1 - kept), kept.shape), 1 - kept)


@contextmanager
def kept_bytes(*known: Tensor) -> Iterator[dict[int, int]]:
    """Bytes of the distinct storages that autograd keeps for backward, those of `known` left out."""
    kept: dict[int, int] = {}
    pointers = {tensor.untyped_storage().data_ptr() for tensor in known}
    alive = []  # storages that were freed would have addresses that others get again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in pointers:
            alive.append(storage)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_ranks_and_bits_not_widths(dropout: float, base_dtype: torch.dtype) -> None:
    """Beside x itself and the parameters: r + n values a token, and a bit an element of x under dropout. A kept
    [tokens, out], a cast of x or a mask would be more.
    """
    size = (256, 512)
    heads = make_heads(torch.float32, num_heads=4, dropout=dropout, size=size)
    x = torch.randn(TOKENS, size[0], dtype=base_dtype, requires_grad=True)
    base = torch.randn(TOKENS, size[1], dtype=base_dtype, requires_grad=True)
    with kept_bytes(x, *heads.parameters()) as kept:
        y = heads(x, base)
    assert y.requires_grad
    bits = TOKENS * size[0] // 8 if dropout else 0
    assert sum(kept.values()) <= TOKENS * (RANK + 4) * 4 + bits


def test_parameters_are_kept_as_themselves() -> None:
    """Under ZeRO-3 a parameter's memory is freed after forward; a view or a cast that is kept would hold it, or be
    empty in backward.
    """
    for dropout, dtype in product((0.0, DROPOUT), (torch.float32, torch.bfloat16)):
        heads = make_heads(dtype, dropout=dropout)
        whole = {name: p.detach().clone() for name, p in heads.named_parameters()}
        x, base = inputs(dtype, 6)
        want = outcome(heads, heads, x, base)[1]
        torch.manual_seed(5)
        y = heads(x, base)
        for p in heads.parameters():
            p.data.fill_(torch.nan)  # somebody else's by now
            p.data = torch.empty(0, dtype=dtype)
        for name, p in heads.named_parameters():
            p.data = whole[name]  # gathered again, somewhere else
            p.grad = None
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        (y.double().pow(2) * weight).sum().backward()
        assert torch.equal(heads.weight_ar.grad, want["ar"])
        assert torch.equal(heads.weight_b.grad, want["b"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_and_other_draws_do_not_move_the_mask(
    reentrant: bool, dtype: torch.dtype
) -> None:
    heads = make_heads(dtype, dropout=DROPOUT)
    x, base = inputs(dtype, TOKENS)
    want, want_grads = outcome(heads, heads, x, base)

    def checkpointed(x: Tensor, base: Tensor) -> Tensor:
        y = checkpoint(heads, x, base, use_reentrant=reentrant)
        torch.rand(3)  # somebody else's draw before backward
        return y

    got, got_grads = outcome(checkpointed, heads, x, base)
    assert torch.equal(got, want)
    for name, grad in want_grads.items():
        assert torch.equal(got_grads[name], grad), name


def test_backward_leaves_the_generator_alone() -> None:
    """A micro batch's dropout is a function of its seed, which a draw in backward would break."""
    heads = make_heads(torch.float32, dropout=DROPOUT)
    x, base = inputs(torch.float32, TOKENS)
    torch.manual_seed(5)
    torch.nn.functional.dropout(x, DROPOUT)
    want = torch.get_rng_state()
    torch.manual_seed(5)
    y = heads(x, base)
    assert torch.equal(torch.get_rng_state(), want)  # forward draws what F.dropout draws
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), want)


def test_the_same_seed_gives_the_same_bits() -> None:
    heads = make_heads(torch.float32, dropout=DROPOUT)
    x, base = inputs(torch.float32, 3, TOKENS)
    first, second = (outcome(heads, heads, x, base) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_stay_near_fp64_and_give_each_its_own(
    autocast: bool, x_dtype: torch.dtype, base_dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    """Measured worst 1.2e-2 of the largest value where anything is bf16 (8 bits, three products in a row)."""
    heads = make_heads(adapter_dtype, dropout=DROPOUT)
    exact = make_heads(torch.float64, dropout=DROPOUT)
    exact.load_state_dict(heads.state_dict())
    x, base = inputs(torch.float64, TOKENS)
    with torch.no_grad():  # both get the rounded inputs
        x.copy_(x.to(x_dtype))
        base.copy_(base.to(base_dtype))
    want, want_grads = outcome(lambda x, base: loop(exact, x, base), exact, x, base)
    rounded = x.detach().to(x_dtype), base.detach().to(base_dtype)
    x, base = (tensor.requires_grad_() for tensor in rounded)

    def run(x: Tensor, base: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return heads(x, base)

    got, got_grads = outcome(run, heads, x, base)
    computed = torch.bfloat16 if autocast else adapter_dtype
    assert got.dtype == torch.promote_types(base_dtype, computed)
    assert worst_relative(got.double(), want) <= 4e-2
    for (name, grad), tensor in zip(
        got_grads.items(), (x, base, heads.weight_ar, heads.weight_b), strict=True
    ):
        assert grad.dtype == tensor.dtype
        assert worst_relative(grad.double(), want_grads[name]) <= 4e-2, name


def test_the_output_may_be_changed_in_place() -> None:
    """As that of any layer: residual streams are added to in place."""
    heads = make_heads(torch.float64)
    x, base = inputs(torch.float64, 2, 3)
    want, want_grads = outcome(lambda x, base: heads(x, base) + 1, heads, x, base)
    got, got_grads = outcome(lambda x, base: heads(x, base).add_(1), heads, x, base)
    assert torch.equal(got, want)
    assert torch.equal(got_grads["x"], want_grads["x"])
    assert torch.equal(base.detach(), inputs(torch.float64, 2, 3)[1].detach())  # base was only read


def test_strides_do_not_matter() -> None:
    heads = make_heads(torch.float64, dropout=DROPOUT)
    x, base = inputs(torch.float64, 3, 5)
    want, want_grads = outcome(heads, heads, x, base)
    x_t = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    base_t = base.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got, got_grads = outcome(heads, heads, x_t, base_t)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-12, atol=1e-12)
    y = heads(x, base)
    y.sum().backward()  # whose gradient is one number, expanded
    assert x.grad.isfinite().all()
