"""Make the name `INTERACTION_LORA` known to PEFT.

PEFT 0.21 looks methods up by a member of its closed enum `PeftType`, and `register_peft_method`
refuses any other name. Python offers no supported way to add a member to a finished enum, so
`add_peft_type` fills in the four places where CPython 3.11 and 3.12 keep one. The `aenum` package
does the same; that is a dependency for eight lines.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

PEFT_TYPE_NAME = "INTERACTION_LORA"
PREFIX = "ilora_"
"""Every trainable parameter's name contains it; PEFT finds, saves and loads adapter weights by
it.
"""


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, adding it if PEFT does not have it (value = name,
    as for the others).
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    type.__setattr__(
        PeftType, name, member
    )  # Enum's own setattr would refuse it later, as a member
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type[BaseTuner]) -> None:
    """Register the method with PEFT; safe to call again."""
    if add_peft_type(PEFT_TYPE_NAME) in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(
        name=PEFT_TYPE_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX
    )
