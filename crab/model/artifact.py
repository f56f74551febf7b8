"""What training leaves behind: a folder that PEFT can read, and the rest of the trained weights.

    crab.json               config, ids of the added tokens, lineage (whatever the job wants to keep)
    adapter/                PEFT's own files, for PeftModel.from_pretrained, and lineage.json once more: this folder
                            alone is what people pass on
    trained.safetensors     projectors, mask decoder and rows of the added tokens
    tokenizer/              the tokenizer with Crab's tokens
    digests.json            SHA-256 of all of these; written last, checked before anything is loaded

The frozen LLM is not in it; crab.json says where it was. A folder appears whole (written under
another name, read back and compared, then renamed) or not at all.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crab.model.artifact_files import (
    DamagedExportError,
    check_digests,
    check_weights,
    write_digests,
)
from crab.model.build import build_model
from crab.model.config import CrabConfig
from crab.model.crab_model import CrabModel
from crab.model.llm import load_tokenizer

FORMAT = 3
"""2: a mask decoder may be among the weights, and the tokens that the answers hold are ordinary ones.
3: digests.json."""
RECORD = "crab.json"
LINEAGE = "adapter/lineage.json"
WEIGHTS = "trained.safetensors"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
_LLM = "llm."


def save_model(
    model: CrabModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Path:
    """Write what is trained to a new folder.

    Args:
        state: trained tensors by the names of `model.trainable_parameters()`; default: the model's
            own. Pass the gathered ones where the model is sharded.
        lineage: JSON values kept in crab.json (manifest digest, commit, step ...).

    Raises:
        FileExistsError: the folder exists.
        ValueError: `state` does not have exactly the model's trained names, has empty tensors, or
            NaN or infinity in one.
        RuntimeError: what was read back is not what was written.
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists; save to a new folder or remove it first")
    tensors = dict(model.trainable_state_dict() if state is None else state)
    expected = model.trainable_parameters().keys()
    if tensors.keys() != expected or any(t.numel() == 0 for t in tensors.values()):
        wrong = sorted(tensors.keys() ^ expected) or [n for n, t in tensors.items() if not len(t)]
        raise ValueError(
            f"these tensors are not the model's trained parameters; {len(wrong)} missing, "
            f"unexpected or empty, first {wrong[:3]}"
        )
    if wild := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(
            f"{wild[0]} is not finite, nor are {len(wild) - 1} other tensors; nothing was exported. "
            "Go back to a checkpoint from before that"
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _write(model, tokenizer, temporary, tensors, lineage or {})
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load_model(
    folder: str | Path, *, llm_path: str | None = None
) -> tuple[CrabModel, PreTrainedTokenizerBase]:
    """The saved model, in evaluation mode, and its tokenizer.

    `llm_path` says where the LLM lies now, if not where it lay in training.

    Raises:
        FileNotFoundError: no such folder, or it is not one of ours.
        DamagedExportError: a file is absent or not what training wrote, or a tensor is empty or not finite.
        ValueError: another format, other token ids, or weights that do not fit.
    """
    source = Path(folder)
    record = _checked_record(source)
    # Its first values have long been trained away: the folder that they came from need not be there any more.
    config = CrabConfig.model_validate(record["config"] | {"initial": None})
    if llm_path is not None:
        llm = config.llm.model_copy(update={"path": llm_path, "architecture": None})
        config = config.model_copy(update={"llm": llm})
    tokenizer = load_tokenizer(str(source / "tokenizer"))
    model = build_model(config, tokenizer)
    if model.table.id_of != record["tokens"]:
        raise ValueError(f"{source}: the tokenizer gives Crab's tokens other ids than in training")
    state = _weights(source / WEIGHTS)
    if isinstance(model.llm, PeftModel):
        state |= _load_adapter(model.llm, source)
    model.load_trainable(state)
    return model.eval(), tokenizer


def verify_model(folder: str | Path) -> dict[str, Any]:
    """Checks a saved folder without building a model: every file by its digest, every tensor for elements and numbers.

    Returns what crab.json says. Raises as `load_model`; which language model it needs is not looked at.
    """
    source = Path(folder)
    record = _checked_record(source)
    _weights(source / WEIGHTS)
    if (source / ADAPTER_WEIGHTS).is_file():
        _weights(source / ADAPTER_WEIGHTS)
    return record


def _checked_record(source: Path) -> dict[str, Any]:
    if not (source / RECORD).is_file():
        raise FileNotFoundError(f"{source} has no {RECORD}; give a folder that training exported")
    try:
        record = dict(json.loads((source / RECORD).read_bytes()))
    except ValueError as error:
        check_digests(source)  # says so better
        raise DamagedExportError(f"{source / RECORD} is damaged: {error}") from error
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{source} has format {record.get('format')}, this version reads {FORMAT}; train the adapter again, "
            "or load it with the version that made it"
        )
    check_digests(source)
    return record


def _weights(file: Path) -> dict[str, Tensor]:
    tensors = load_file(file)
    check_weights(file, tensors)
    return tensors


def _write(
    model: CrabModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    tensors: dict[str, Tensor],
    lineage: Mapping[str, Any],
) -> None:
    folder.mkdir(parents=True)
    rest = {name: t.contiguous() for name, t in tensors.items() if not name.startswith(_LLM)}
    adapter = {name[len(_LLM) :]: t for name, t in tensors.items() if name.startswith(_LLM)}
    save_file(rest, folder / WEIGHTS)
    written = dict(rest)
    read_back = load_file(folder / WEIGHTS)
    if isinstance(model.llm, PeftModel):
        # "auto" would look for a changed vocabulary on the hub; our embeddings are never changed.
        model.llm.save_pretrained(
            str(folder / "adapter"), state_dict=adapter, save_embedding_layers=False
        )
        written |= get_peft_model_state_dict(
            model.llm, state_dict=adapter, save_embedding_layers=False
        )
        read_back |= load_file(folder / ADAPTER_WEIGHTS)
        if len(written) != len(tensors):
            raise RuntimeError(f"PEFT kept {len(written) - len(rest)} of {len(adapter)} tensors")
    if written.keys() != read_back.keys() or not all(
        torch.equal(written[name], read_back[name]) for name in written
    ):
        raise RuntimeError(
            f"what was read back from {folder} is not what was written; check the disk"
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    record = {
        "format": FORMAT,
        "config": model.config.model_dump(mode="json"),
        "tokens": model.table.id_of,
        "lineage": dict(lineage),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    if isinstance(model.llm, PeftModel):
        (folder / LINEAGE).write_text(json.dumps(dict(lineage), indent=2, allow_nan=False) + "\n")
    write_digests(folder)
    verify_model(folder)


def _load_adapter(llm: PeftModel, source: Path) -> dict[str, Tensor]:
    """The adapter's tensors under the names that they have in CrabModel; checked by name and
    shape.
    """
    saved = _weights(source / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(llm, save_embedding_layers=False)
    wrong = sorted(saved.keys() ^ expected.keys()) or [
        name for name in saved if saved[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{source / ADAPTER_WEIGHTS} does not fit the adapter in {RECORD}: {len(wrong)} names "
            f"missing, unexpected or of another shape, first {wrong[:3]}"
        )
    set_peft_model_state_dict(llm, saved)
    return {_LLM + name: p.detach() for name, p in llm.named_parameters() if p.requires_grad}
