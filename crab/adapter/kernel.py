"""The arithmetic of one adapted layer, forward and backward, with little kept in between.

    y = base + s * sum_i w_i B_i A drop(x),    w = softmax(R x / T)

and with H = A drop(x), B = [B_1 .. B_n] side by side and Z = s * (w outer H), one product

    y = base + B Z

Everything of the sum happens in rank space: [n * r, tokens] instead of n times [tokens, out].
With d for "gradient of the loss by", and G = dy, the chain rule gives

    dB = G Z'                          dZ = B' G, in n blocks dZ_i of [r, tokens]
    dH = s * sum_i w_i dZ_i            dw_i = s * <H, dZ_i>
    dRx = w * (dw - <w, dw>) / T       (of the logits; <,> is a token's own)
    d[A; R] = [dH drop(x)'; dRx x']    dx = drop(A' dH) + R' dRx, with the mask of forward

which needs x, the two parameters, and [H; Rx] of [r + n, tokens]: w and Z are made again from
it in less time than it takes to notice. Dropout adds one bit an element of x; autograd would keep
two more [tokens, in] (the noise, and its product with x). The bits are kept, not the generator's
state: drawing them a second time costs nearly as much as the rest of the adapter (CPU, 4 ms a
million), and nothing depends on who moved the generator in between (activation checkpointing, other threads).

Tensors here lie rank first, [rank, tokens]: the skinny products are then faster by up to 1.8
(MKL), and elementwise work runs along the tokens. Parameters are saved as they are, never a view
or a cast of one: ZeRO-3 frees and gathers a parameter's memory between forward and backward,
which a view would keep alive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Eight bytes of 0 or 1 as one integer: this product moves them to the bits of its top byte; the
# second copies a byte eight times, of which each keeps one bit.
_GATHER = 0x0102040810204080
_COPY = 0x0101010101010101
_ONE_BIT_EACH = 0x8040201008040201 - (1 << 64)  # as a signed integer


def draw_kept(like: Tensor, dropout: float) -> Tensor:
    """1 where dropout keeps, else 0, in the shape of `like`; the mask that F.dropout draws for a
    contiguous tensor (CPU), and the same for any other strides.

    uint8, because torch casts bool to float at a seventh of the speed.
    """
    kept = torch.empty(like.shape, dtype=torch.uint8, device=like.device)
    return kept.bernoulli_(1 - dropout)


def pack_bits(kept: Tensor) -> Tensor:
    """uint8 0 and 1 of any shape -> uint8 [numel / 8, rounded up], a bit an element."""
    flat = kept.reshape(-1)
    missing = -flat.numel() % 8
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of pack_bits: uint8 0 and 1 in `shape`."""
    words = bits.to(torch.int64).mul_(_COPY).bitwise_and_(_ONE_BIT_EACH)
    kept = words.view(torch.uint8).clamp_(max=1)  # a byte was 0 or one power of two
    return kept[: shape.numel()].view(shape)


def _mixture(gates: Tensor, code: Tensor, scale: float) -> Tensor:
    """Z = s * (w outer H): gates [n, tokens], code [r, tokens] -> [n * r, tokens] in fp32 or wider."""
    return ((scale * gates).unsqueeze(1) * code).flatten(0, 1)


def _gates(logits: Tensor, temperature: float) -> Tensor:
    """softmax(L / T) over heads, [n, tokens], at least in fp32 (fp64 stays, for parity tests)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(wide if temperature == 1 else wide / temperature, dim=0)


class InteractionKernel(torch.autograd.Function):
    """`apply(x, base, weight_ar, weight_b, rank, scaling, temperature, dropout, dtype)` returns y
    and the gates; see the module's docstring for the equations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        weight_ar: Tensor,
        weight_b: Tensor,
        rank: int,
        scaling: float,
        temperature: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """x [..., in], base [..., out], weight_ar [r + n, in], weight_b [out, n * r] -> y
        [..., out] in the wider of base's dtype and `dtype`, and gates [n, tokens], which have no
        gradient. Products are in `dtype`; dropout is 0 outside training.
        """
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ar, b = weight_ar.to(dtype), weight_b.to(dtype)
        bits = None
        if dropout > 0:
            # 1 / (1 - dropout) goes into the scale: one pass over [tokens, in] less.
            scaling /= 1 - dropout
            kept = draw_kept(rows, dropout)
            bits = pack_bits(kept)
            codes = rows.new_empty(ar.shape[0], rows.shape[0])
            # In place: a new [tokens, in] costs more in page faults than in arithmetic (CPU).
            torch.mm(ar[:rank], kept.to(dtype).mul_(rows).t(), out=codes[:rank])
            torch.mm(ar[rank:], rows.t(), out=codes[rank:])
        else:
            codes = ar @ rows.t()
        gates = _gates(codes[rank:], temperature)
        mixture = _mixture(gates, codes[:rank], scaling).to(dtype)
        # Made in its final shape: a view made here could not be changed in place by the caller.
        wide = torch.promote_types(base.dtype, dtype)
        y = torch.empty(base.shape, dtype=wide, device=base.device).copy_(base)
        flat = y.view(-1, y.shape[-1])
        if wide == dtype:
            flat.addmm_(mixture.t(), b.t())  # added as it is made: no [tokens, out] for the delta
        else:
            flat.add_(mixture.t() @ b.t())

        # A frozen A needs no x. (The base layer is frozen, so nobody else keeps x for sure.)
        kept_x = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept_x, weight_ar, weight_b, codes, bits)
        ctx.constants = (rank, scaling, temperature, dtype)
        ctx.inputs = (x.shape, x.dtype, base.dtype)
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        return y, gates

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, _grad_gates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, base, weight_ar and weight_b, each only if it is asked for."""
        if grad_y is None:
            return (None,) * 9
        need_x, need_base, need_ar, need_b = ctx.needs_input_grad[:4]
        rank, scale, temperature, dtype = ctx.constants
        x_shape, x_dtype, base_dtype = ctx.inputs
        x, weight_ar, weight_b, codes, bits = ctx.saved_tensors
        grad = grad_y.reshape(-1, grad_y.shape[-1]).to(dtype)  # G', [tokens, out]
        gates = _gates(codes[rank:], temperature)

        grad_base = grad_y.to(base_dtype) if need_base else None
        grad_b = None
        if need_b:
            mixture = _mixture(gates, codes[:rank], scale).to(dtype)
            # The transposed product and a copy of a parameter's size beat grad' @ mixture'.
            grad_b = (mixture @ grad).t().contiguous().to(weight_b.dtype)
        if not (need_x or need_ar):
            return None, grad_base, None, grad_b, None, None, None, None, None

        grad_mixture = weight_b.to(dtype).t() @ grad.t()  # [n * r, tokens]
        per_head = grad_mixture.unflatten(0, (-1, rank)).to(gates.dtype)
        grad_code = (per_head * gates.unsqueeze(1)).sum(0).mul_(scale)
        grad_gates = (per_head * codes[:rank]).sum(1).mul_(scale)
        grad_logits = gates * (grad_gates - (gates * grad_gates).sum(0)) / temperature
        grad_codes = torch.cat([grad_code, grad_logits]).to(dtype)  # [r + n, tokens]

        kept = spare = grad_ar = grad_x = None
        if need_x:
            # In its final shape: autograd adds the base layer's gradient into a tensor that nobody
            # else refers to, and into a new one otherwise (a view refers to what it is a view of).
            grad_x = torch.empty(x_shape, dtype=dtype, device=grad.device)
            spare = grad_x.view(-1, x_shape[-1])
        if bits is not None:
            kept = unpack_bits(bits, x_shape).view(-1, x_shape[-1]).to(dtype)
        if need_ar:
            rows = x.reshape(-1, x_shape[-1]).to(dtype)
            if kept is None:
                grad_ar = grad_codes @ rows
            else:
                dropped = torch.mul(rows, kept, out=spare)  # before grad_x is written there
                grad_ar = torch.empty_like(weight_ar, dtype=dtype)
                torch.mm(grad_codes[:rank], dropped, out=grad_ar[:rank])
                torch.mm(grad_codes[rank:], rows, out=grad_ar[rank:])
            grad_ar = grad_ar.to(weight_ar.dtype)
        if grad_x is not None and spare is not None:
            ar = weight_ar.to(dtype)
            if kept is None:
                torch.mm(grad_codes.t(), ar, out=spare)
            else:
                torch.mm(grad_codes[:rank].t(), ar[:rank], out=spare).mul_(kept)
                spare.addmm_(grad_codes[rank:].t(), ar[rank:])
            grad_x = grad_x.to(x_dtype)
        return grad_x, grad_base, grad_ar, grad_b, None, None, None, None, None
