"""A sample as text: the prompt that the model reads and the target that it must write.

Wording and order are Crab's: each medium announced in a line, its placeholder between start and end
tokens, then the request. Media that a sample does not have are left out, since a placeholder
without features would be noise. Prompt and target are tokenised apart, so that generation starts
from exactly the ids that training saw.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from crab.model.tokens import MEDIA_TOKENS
from crab.tasks import TASKS
from crab.tasks.base import full_target

if TYPE_CHECKING:
    from crab.model.config import PromptConfig
    from crab.samples import Sample

_INTRODUCTION = {
    "video": "This is a video",
    "image": "This is an image",
    "audio": "This is an audio",
}


def user_text(sample: Sample, media: Collection[str]) -> str:
    """Media lines for those of video, image and audio that are in `media`, then the instruction.

    Raises:
        ValueError: the instruction itself contains one of the media tokens.
    """
    found = [token for token in MEDIA_TOKENS if token in sample.instruction]
    if found:
        raise ValueError(
            f"sample {sample.id!r}: the instruction contains {found}, which only the prompt may "
            "write; "
            "remove them from the samples file"
        )
    lines = [
        f"{introduction}:\n<{name}_start><{name}><{name}_end>\n"
        for name, introduction in _INTRODUCTION.items()
        if name in media
    ]
    return "".join(lines) + sample.instruction


def target_text(sample: Sample, config: PromptConfig) -> str:
    """What the model must write: what the task says (reasoning, if it has any, and tagged answer), or the answer
    alone where reasoning is not wanted."""
    if not config.include_reasoning:
        return sample.answer.strip()
    task = TASKS.get(sample.task)
    return full_target(sample) if task is None else task.target(sample)


def prompt_text(text: str, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> str:
    """Wrap the user's text in the tokenizer's chat template, or in a plain one: bos, text, line
    break.
    """
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}{text}\n"
    user = {"role": "user", "content": text}
    try:
        return _render(tokenizer, [{"role": "system", "content": config.system}, user])
    except TemplateError:
        # Some templates (Gemma's) refuse a system turn; the user's turn then carries the text.
        return _render(tokenizer, [{"role": "user", "content": f"{config.system}\n\n{text}"}])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
