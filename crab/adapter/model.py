"""The tuner that PEFT drives: finds the targets, wraps them, and states what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from crab.adapter.config import InteractionLoraConfig
from crab.adapter.layer import BASE, MERGE_REFUSED, InteractionLoraLinear
from crab.adapter.register import PREFIX
from crab.adapter.targets import check_targets


class InteractionLoraModel(BaseTuner):
    """Interaction-aware LoRA on a whole model; made by `get_peft_model`, not by hand."""

    prefix: str = PREFIX
    tuner_layer_cls = InteractionLoraLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's declaration)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check the targets while the model is still as it was; PEFT calls this before it
        replaces anything.
        """
        assert isinstance(peft_config, InteractionLoraConfig)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return
        names: dict[str, nn.Module] = {}
        wrapped: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or name.startswith(wrapped):
                continue  # the inside of a layer that an earlier adapter has wrapped
            if isinstance(module, BaseTunerLayer):
                wrapped += (f"{name}.",)
                module = module.get_base_layer()
            names[name] = module
        matched = {
            n: m for n, m in names.items() if self._check_target_module_exists(peft_config, n)
        }
        check_targets(targets, matched, names)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, InteractionLoraConfig)
        if isinstance(target, InteractionLoraLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = InteractionLoraLinear(target, adapter_name, peft_config)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(
        self,
        *_args: Any,
        adapter_names: Sequence[str] | None = None,
        num_beams: int | None = None,
        num_return_sequences: int | None = None,
        **_kwargs: Any,
    ) -> Iterator[None]:
        """PEFT enters this around every forward and generate, with their arguments, and takes
        adapter_names out of them: here they reach the layers.

        adapter_names: one name for each sample, BASE for no adapter. generate repeats a sample for
        each of its beams or answers, and so are the names.

        Raises ValueError for a name that is no adapter's, and in training (as PEFT's LoRA does:
        which adapter a step changes would depend on its batch).
        """
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "adapter_names cannot be given in training: call model.eval() first, or choose what "
                "is trained with set_adapter."
            )
        known = {BASE, *self.peft_config}
        if unknown := sorted(set(adapter_names) - known):
            raise ValueError(
                f"adapter_names has {', '.join(map(repr, unknown))}; this model has "
                f"{', '.join(sorted(known))}."
            )
        copies = max(num_beams or 1, num_return_sequences or 1)
        names = [name for name in adapter_names for _ in range(copies)]

        def pass_names(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, "adapter_names": names}

        with ExitStack() as hooks:
            for module in self.modules():
                # The second kind holds what modules_to_save names.
                if isinstance(module, InteractionLoraLinear | AuxiliaryTrainingWrapper):
                    handle = module.register_forward_pre_hook(pass_names, with_kwargs=True)
                    hooks.callback(handle.remove)
            yield

    def _check_merge_allowed(self) -> None:
        """Refuse before the first layer, so that a refused merge leaves the model as it was."""
        raise NotImplementedError(MERGE_REFUSED)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Any]:
        """PEFT's selection, but empty tensors raise: they are ZeRO-3 or FSDP shards that nobody
        gathered.
        """
        selected = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        empty = [name for name, tensor in selected.items() if tensor.numel() == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} adapter tensors are empty, the first is {empty[0]}: the parameters "
                f"are sharded. Save inside deepspeed.zero.GatheredParameters(adapter_parameters), "
                f"entered on all ranks."
            )
        return selected
