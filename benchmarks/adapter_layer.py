"""Time and memory of the adapter, forward and backward: ours, PEFT's LoRA, a loop over heads, PEFT's mixtures.

    python benchmarks/adapter_layer.py [--repeats 15] [--only layer|model|use]

One thread. *Adapter time* is a step with the adapter less a step of the frozen layer alone (which still makes the
gradient of its input), within one round, in CPU seconds: with one thread they are what a quiet machine's clock shows.
*Saved* is what autograd keeps for backward beyond the frozen layer's, x and parameters left out. Candidates take turns
in every round, so a slow moment of the machine touches all of them.

The loop is HydraLoRA's and Crab's published form, written from its formula: for every head
`gate_i * B_i(A(drop(x))) * s`, with A and a mask of its own for every head. It gets our weights, and so does X-LoRA's
layer; unless outputs and all gradients agree with ours, no figure is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from measure import Goals, header, versions
from peft import LilyConfig, LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.lora import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from crab.adapter import LLAMA_LINEARS, InteractionHeads, InteractionLoraConfig

TOLERANCE = 1e-5  # fp32, relative to the largest value; measured 1.3e-6
MODEL_TOLERANCE = 1e-5  # the same through 8 layers; measured 2.1e-6
ALPHA = 16
HEADS = 4


@dataclass(frozen=True)
class Shape:
    """One layer, width -> width, and what is put on it."""

    tokens: int
    width: int
    rank: int
    dropout: float = 0.0


class OneLinear(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(width, width, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        y: Tensor = self.lin(x)
        return y


class HeadLoop(nn.Module):
    """The published form: every head runs A again and makes its own [tokens, out]."""

    def __init__(self, base: nn.Module, heads: InteractionHeads) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(heads.shared_a.detach().clone())
        self.router = nn.Parameter(heads.router.detach().clone())
        self.bs = nn.ParameterList(b.detach().clone() for b in heads.heads_b)
        self.scaling = heads.scaling
        self.dropout = nn.Dropout(heads.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = self.base(x)
        gates = torch.softmax(x @ self.router.t(), dim=-1, dtype=torch.float32)
        for i, b in enumerate(self.bs):
            code = nn.functional.linear(self.dropout(x), self.a)
            y = y + gates[..., i].unsqueeze(-1) * nn.functional.linear(code, b) * self.scaling
        return y

    def gradients(self) -> list[Tensor]:
        """Of weight_ar and weight_b, in the layout of InteractionHeads."""
        return [
            torch.cat([grad(self.a), grad(self.router)]),
            torch.cat([grad(b) for b in self.bs], dim=1),
        ]


class XLora(nn.Module):
    """PEFT's X-LoRA layer on four LoRAs, its scalings from a router like ours. In X-LoRA a classifier makes them from
    a second forward of the whole model, which is not counted here. With our A in all four it computes what we do.
    """

    def __init__(self, base: OneLinear, heads: InteractionHeads) -> None:
        super().__init__()
        lora = several_loras(base, heads)
        self.lora = lora
        self.router = nn.Parameter(heads.router.detach().clone())
        config = XLoraConfig(hidden_size=heads.shared_a.shape[1], adapters={})
        config.enable_softmax_topk = False
        config.top_k_lora = None
        config.global_scaling_weight = 1.0
        target = lora.base_model.model.lin
        model = types.SimpleNamespace(disabled=False)
        self.layer = XLoraLinearLayer(model, target, target.forward, 0, config)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, width] -> the same shape."""
        scalings = torch.softmax(x @ self.router.t(), dim=-1).unsqueeze(2)
        y: Tensor = self.layer.forward(x, scalings=scalings)
        return y

    def gradients(self) -> list[Tensor]:
        """Of weight_ar and weight_b; A's is the sum over its four copies."""
        layer = self.layer.target
        a = sum(grad(layer.lora_A[n].weight) for n in names())
        return [
            torch.cat([a, grad(self.router)]),
            torch.cat([grad(layer.lora_B[n].weight) for n in names()], dim=1),
        ]


class Arrow(nn.Module):
    """PEFT's Arrow layer over four LoRAs, all of them chosen for every token. Its router is not learnt (it comes from
    the LoRAs' singular vectors), so it does less than we do; A and B are trained here, to give backward its work.
    """

    def __init__(self, base: OneLinear, heads: InteractionHeads) -> None:
        super().__init__()
        self.lora = several_loras(base, heads)
        self.target = self.lora.base_model.model.lin
        config = ArrowConfig(top_k=len(names()))
        config.task_adapter_names = names()
        config.gks_adapter_names = []
        self.arrow = ArrowLoraLinearLayer(heads.shared_a.shape[1], config)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, width] -> the same shape."""
        target = self.target
        self.arrow.build_prototypes(target.lora_A, target.lora_B)
        y: Tensor = target.base_layer(x) + self.arrow(
            x, target.lora_A, target.lora_B, target.lora_dropout["0"], target.scaling
        )
        return y


def names() -> list[str]:
    """Adapter names of a mixture of LoRAs."""
    return [str(i) for i in range(HEADS)]


def several_loras(base: OneLinear, heads: InteractionHeads) -> nn.Module:
    """PEFT LoRAs side by side, all active, each with our A and one of our B."""
    config = LoraConfig(
        r=heads.r, lora_alpha=ALPHA, lora_dropout=heads.dropout, target_modules=["lin"]
    )
    model = get_peft_model(base, config, adapter_name="0")
    for name in names()[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(names())
    layer = model.base_model.model.lin
    with torch.no_grad():
        for name, b in zip(names(), heads.heads_b, strict=True):
            layer.lora_A[name].weight.copy_(heads.shared_a)
            layer.lora_B[name].weight.copy_(b)
    return model


def grad(tensor: Tensor) -> Tensor:
    """The gradient, which a step has just made."""
    assert tensor.grad is not None
    return tensor.grad


def worst_relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference of a tensor over the largest value that was wanted in it, the worst; NaN if any is."""
    pairs = zip(got, want, strict=True)
    return torch.stack([(g - w).abs().max() / w.abs().max() for g, w in pairs]).max().item()


def saved_bytes(model: nn.Module, run: Callable[[], Tensor], *known: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for backward, parameters and `known` left out."""
    skipped = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *known]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


@dataclass
class Candidate:
    """A module, what one step of it is, and its seconds, a round each."""

    module: nn.Module
    run: Callable[[], Tensor]
    grad_out: Tensor | None = None
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    saved: int = 0

    def step(self) -> Tensor:
        """Forward and backward."""
        self.module.zero_grad(set_to_none=True)
        y = self.run()
        y.backward(self.grad_out)
        return y.detach()


def take_turns(candidates: dict[str, Candidate], repeats: int) -> None:
    """Two rounds that are not counted, then `repeats` in which each makes one step."""
    gc.collect()
    gc.disable()
    for number in range(repeats + 2):
        for candidate in candidates.values():
            cpu, wall = time.process_time(), time.perf_counter()
            candidate.step()
            if number >= 2:
                candidate.cpu_s.append(time.process_time() - cpu)
                candidate.wall_s.append(time.perf_counter() - wall)
    gc.enable()


def gradients_are_right() -> bool:
    """gradcheck in fp64, with dropout."""
    torch.manual_seed(0)
    heads = InteractionHeads(6, 5, InteractionLoraConfig(num_heads=3, r=2, lora_dropout=0.3))
    heads = heads.double()
    nn.init.normal_(heads.weight_b)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    base = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, base: Tensor, ar: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(heads, {"weight_ar": ar, "weight_b": b}, (x, base))

    return torch.autograd.gradcheck(
        run, (x, base, heads.weight_ar, heads.weight_b), raise_exception=False
    )


def bench_layer(shape: Shape, repeats: int, goals: Goals) -> None:
    """B10 of the performance notes, one layer."""
    width, rank, dropout = shape.width, shape.rank, shape.dropout
    config = InteractionLoraConfig(
        num_heads=HEADS,
        r=rank,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=["lin"],
    )

    def lora(rank: int) -> nn.Module:
        plain = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["lin"])
        return get_peft_model(OneLinear(width), plain)

    ours = get_peft_model(OneLinear(width), config)
    heads = next(m for m in ours.modules() if isinstance(m, InteractionHeads))
    nn.init.normal_(heads.weight_b, std=0.02)
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(2, shape.tokens // 2, width, generator=generator) for _ in "xw")
    x.requires_grad_()

    makers: dict[str, Callable[[], nn.Module]] = {
        "frozen layer": lambda: OneLinear(width),
        "ours": lambda: ours,
        f"LoRA r={rank}": lambda: lora(rank),
        f"LoRA r={HEADS * rank}": lambda: lora(HEADS * rank),
        "loop over heads": lambda: HeadLoop(OneLinear(width), heads),
        "xlora, its layer": lambda: XLora(OneLinear(width), heads),
        "arrow, its layer": lambda: Arrow(OneLinear(width), heads),
        # Lily's router is averaged over all tokens of a batch: another, cheaper function.
        "lily": lambda: get_peft_model(
            OneLinear(width),
            LilyConfig(r=rank, num_B=HEADS, stride_A=1, scaling=2.0, target_modules=["lin"]),
        ),
    }
    header(
        f"one layer: {shape.tokens} tokens, {width} -> {width}, rank {rank}, dropout {dropout:g}"
    )
    candidates: dict[str, Candidate] = {}
    for name, make in makers.items():
        try:
            module = make().train()
            candidate = Candidate(module, lambda module=module: module(x), weight)
            x.grad = None
            candidate.step()
        except Exception as error:  # a peer that cannot is told, and the others are measured
            if name in ("frozen layer", "ours", "loop over heads"):
                raise
            goals.broken(f"{name} cannot run: {type(error).__name__}: {error}")
            continue
        candidates[name] = candidate

    def result(name: str) -> list[Tensor]:
        x.grad = None
        module = candidates[name].module.eval()  # without dropout: masks differ
        y = candidates[name].step()
        made = (
            [grad(heads.weight_ar), grad(heads.weight_b)] if name == "ours" else module.gradients()
        )
        module.train()
        return [y, grad(x).clone(), *(g.clone() for g in made)]

    want = result("loop over heads")
    for name in ("ours", "xlora, its layer"):
        if name not in candidates:
            continue
        worst = worst_relative(result(name), want)
        print(f"{name} against the loop, output and all gradients: {worst:.1e} apart")
        if not worst <= TOLERANCE:
            goals.broken(f"{name} and the loop differ by {worst:.1e} > {TOLERANCE:.0e}: no times")
            return

    for candidate in candidates.values():
        candidate.saved = saved_bytes(candidate.module, candidate.run, x)

        def with_fresh_grad(run: Callable[[], Tensor] = candidate.run) -> Tensor:
            x.grad = None
            return run()

        candidate.run = with_fresh_grad
    take_turns(candidates, repeats)

    frozen = candidates["frozen layer"]
    base_s = statistics.median(frozen.cpu_s)
    extra = {
        name: statistics.median(a - b for a, b in zip(c.cpu_s, frozen.cpu_s, strict=True))
        for name, c in candidates.items()
    }
    saved = {name: c.saved - frozen.saved for name, c in candidates.items()}
    print(f"{'':18} {'step ms':>8} {'best':>8} {'wall ms':>8} {'adapter ms':>11} {'saved KiB':>10}")
    for name, c in candidates.items():
        print(
            f"{name:18} {statistics.median(c.cpu_s) * 1e3:8.2f} {min(c.cpu_s) * 1e3:8.2f} "
            f"{statistics.median(c.wall_s) * 1e3:8.2f} {extra[name] * 1e3:11.2f} "
            f"{saved[name] / 1024:10.0f}"
        )
    mine, loop, wide = extra["ours"], "loop over heads", f"LoRA r={HEADS * rank}"
    times, memory = (5, 50) if rank <= 8 else (3, 20)
    goals.check("loop's adapter time / ours", extra[loop] / mine, times)
    goals.check("loop's saved memory / ours", saved[loop] / saved["ours"], memory)
    goals.check(f"our adapter time / {wide}'s", mine / extra[wide], 1.0, at_most=True)
    if (
        not dropout
    ):  # the goals below are on arithmetic; drawing a mask is none, and LoRA draws it too
        limit = 1.10 if width >= 2048 else 1.15
        goals.check("our step / the frozen layer's", 1 + mine / base_s, limit, at_most=True)
        # Multiply-adds of rank space over those of the frozen layer, both forward and backward.
        needed = 6 * ((rank + HEADS) * width + HEADS * rank * width) / (4 * width * width)
        goals.check("least time by arithmetic / ours", needed * base_s / mine, 0.5)


def llama(width: int = 512, layers: int = 8) -> LlamaForCausalLM:
    """Random. A small vocabulary: its product is in every candidate and none's concern."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=1024,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def looped(adapted: nn.Module) -> nn.Module:
    """The same Llama, a loop over heads around every target, with the weights of `adapted`."""
    model = llama()
    for name, module in adapted.get_base_model().named_modules():
        if name.split(".")[-1] in LLAMA_LINEARS:
            heads = module.ilora_heads["default"]
            model.set_submodule(name, HeadLoop(model.get_submodule(name), heads))
    return model


def bench_model(dropout: float, repeats: int, goals: Goals) -> None:
    """B11 of the performance notes, a whole model."""
    batch, length, rank = 2, 128, 8
    settings = {"r": rank, "lora_alpha": ALPHA, "lora_dropout": dropout}
    targets = list(LLAMA_LINEARS)
    ours = get_peft_model(
        llama(), InteractionLoraConfig(num_heads=HEADS, target_modules=targets, **settings)
    )
    all_heads = [m for m in ours.modules() if isinstance(m, InteractionHeads)]
    for heads in all_heads:
        nn.init.normal_(heads.weight_b, std=0.02)
    modules: dict[str, nn.Module] = {
        "ours": ours,
        f"LoRA r={rank}": get_peft_model(llama(), LoraConfig(target_modules=targets, **settings)),
        f"LoRA r={HEADS * rank}": get_peft_model(
            llama(), LoraConfig(target_modules=targets, **{**settings, "r": HEADS * rank})
        ),
        "loop over heads": looped(ours),
    }
    ids = torch.randint(512, (batch, length), generator=torch.Generator().manual_seed(2))

    def loss_of(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: module(input_ids=ids, labels=ids, use_cache=False).loss

    header(
        f"Llama, 8 layers of 512, all 7 linears, {batch} x {length} tokens, rank {rank}, "
        f"dropout {dropout:g}"
    )
    candidates = {
        name: Candidate(module.eval(), loss_of(module)) for name, module in modules.items()
    }
    results = []
    for name in ("ours", "loop over heads"):
        loss = candidates[name].step()
        loops = [m for m in candidates[name].module.modules() if isinstance(m, HeadLoop)]
        made = [g for m in loops for g in m.gradients()] or [
            grad(p) for heads in all_heads for p in (heads.weight_ar, heads.weight_b)
        ]
        results.append([loss, *made])
    worst = worst_relative(*results)
    print(f"ours against the loop, loss and all {len(results[0]) - 1} gradients: {worst:.1e} apart")
    if not worst <= MODEL_TOLERANCE:
        goals.broken(f"ours and the loop differ by {worst:.1e} > {MODEL_TOLERANCE:.0e}: no times")
        return
    for candidate in candidates.values():
        candidate.module.train()
        candidate.saved = saved_bytes(candidate.module, candidate.run)
    take_turns(candidates, repeats)

    print(f"{'':18} {'step ms':>8} {'best':>8} {'wall ms':>8} {'tokens/s':>9} {'kept MB':>8}")
    for name, c in candidates.items():
        middle = statistics.median(c.cpu_s)
        print(
            f"{name:18} {middle * 1e3:8.1f} {min(c.cpu_s) * 1e3:8.1f} "
            f"{statistics.median(c.wall_s) * 1e3:8.1f} {ids.numel() / middle:9.0f} "
            f"{c.saved / 1e6:8.1f}"
        )

    def faster_than(name: str) -> float:
        """Tokens/s of ours over those of another, within a round."""
        pairs = zip(candidates[name].cpu_s, candidates["ours"].cpu_s, strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    goals.check(f"our tokens/s / LoRA r={rank}'s", faster_than(f"LoRA r={rank}"), 0.93)
    goals.check("our tokens/s / the loop's", faster_than("loop over heads"), 1.6)


def bench_use(width: int, layers: int, repeats: int, goals: Goals) -> None:
    """B15 of the performance notes: arithmetic a second of a training step, as a part of what torch.mm reaches.

    Counted for each token: 4 for every weight of a frozen linear layer (forward, gradient of the input), but 2 where
    the input needs no gradient (q, k, v of the first layer); 6 for every weight of the adapter; 6 times width and
    tokens a layer for attention, which is causal: half of every product. Norms, activations and the loss cost time and
    count nothing.
    """
    tokens = 1024
    model = get_peft_model(
        llama(width, layers),
        InteractionLoraConfig(
            num_heads=HEADS, r=8, lora_dropout=0.0, target_modules=list(LLAMA_LINEARS)
        ),
    )
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = model.get_base_model()
    frozen = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    attention = 6 * width * tokens * layers
    needed = tokens * (4 * frozen - 2 * 3 * width * width + 6 * adapter + attention)
    ids = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(3))
    square = torch.randn(2048, 2048)
    steps = {
        "mm": Candidate(nn.Module(), lambda: torch.mm(square, square)),
        "step": Candidate(
            model.train(), lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
        ),
    }
    steps["mm"].step = steps["mm"].run
    header(f"arithmetic: Llama, {layers} layers of {width}, interaction LoRA, 1 x {tokens} tokens")
    take_turns(steps, repeats)
    peak = 2 * 2048**3 / min(steps["mm"].cpu_s)
    reached = needed / min(steps["step"].cpu_s)
    print(
        f"torch.mm {peak / 1e9:.1f} GFLOP/s, a step {reached / 1e9:.1f} GFLOP/s, of which attention "
        f"{attention * tokens / needed:.0%}; best CPU seconds"
    )
    goals.check(f"part of torch.mm's arithmetic at width {width}", reached / peak, 0.6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=["layer", "model", "use"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(f"{versions('torch', 'peft', 'transformers')}; fp32, one thread, {args.repeats} rounds")
    goals = Goals()
    if not gradients_are_right():
        goals.broken("gradcheck in fp64 failed: no times")
        return 1
    print("gradcheck in fp64, with dropout: passed")
    if args.only in (None, "layer"):
        for shape in (
            Shape(1024, 1024, 8),
            Shape(512, 2048, 8),
            Shape(512, 2048, 16),
            Shape(1024, 1024, 8, dropout=0.05),
        ):
            bench_layer(shape, args.repeats, goals)
    if args.only in (None, "model"):
        for dropout in (0.0, 0.05):  # 0.05 is Crab's
            bench_model(dropout, max(3, args.repeats // 3), goals)
    if args.only in (None, "use"):
        for width, layers in ((512, 8), (1024, 2)):
            bench_use(width, layers, max(3, args.repeats // 3), goals)
    return int(goals.failed)


if __name__ == "__main__":
    sys.exit(main())
