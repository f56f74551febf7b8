"""Record what the routers decide, module by module: the raw material of Crab's figure on head
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from crab.adapter.layer import InteractionHeads, InteractionLoraLinear


@contextmanager
def _sink_open(heads: InteractionHeads, sink: list[Tensor]) -> Iterator[None]:
    heads.routing_sinks = (*heads.routing_sinks, sink)
    try:
        yield
    finally:
        heads.routing_sinks = tuple(s for s in heads.routing_sinks if s is not sink)


@contextmanager
def record_routing(
    model: nn.Module, adapter: str | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the router weights of every adapted module while the context is open.

    Yields {module name in `model`: [gates of each forward call]}; gates are [..., num_heads],
    fp32, detached, on the module's device, and sum to 1 over the heads. Of a batch with
    adapter_names only the adapter's own samples are recorded. Recording does not change
    outputs, may be nested, and costs nothing when closed. `adapter` names the adapter; by default
    the active one.

    Leave the context before `backward` if gradient checkpointing is on: it runs forward again,
    which records twice.

    Raises ValueError if the model has no such adapter, or if several are active and none was
    named.
    """
    record: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not isinstance(module, InteractionLoraLinear):
                continue
            wanted = [adapter] if adapter else list(module.active_adapters)
            if len(wanted) > 1:
                raise ValueError(
                    f"{len(wanted)} adapters are active ({', '.join(wanted)}): pass adapter=NAME "
                    f"to record one of them."
                )
            for wanted_name in wanted:
                heads = (
                    module.ilora_heads[wanted_name] if wanted_name in module.ilora_heads else None
                )
                if isinstance(heads, InteractionHeads):
                    record[name] = []
                    stack.enter_context(_sink_open(heads, record[name]))
        if not record:
            raise ValueError(
                f"{type(model).__name__} has no interaction-aware LoRA"
                + (f" named {adapter!r}" if adapter else "")
                + " to record; attach one with peft.get_peft_model(model, InteractionLoraConfig())."
            )
        yield record
