"""Union of the adapter kinds: `adapter:` of a training spec. A new kind is a module of this folder and a name here."""

from typing import Annotated, get_args

from pydantic import Field

from graftwork.adapters.bottleneck import BottleneckSpec
from graftwork.adapters.full import FullSpec
from graftwork.adapters.ia3 import Ia3Spec
from graftwork.adapters.kind import AdapterKind
from graftwork.adapters.lora import LoraSpec
from graftwork.adapters.prefix import PrefixSpec

AdapterSpec = Annotated[LoraSpec | FullSpec | Ia3Spec | PrefixSpec | BottleneckSpec, Field(discriminator="kind")]

KINDS: tuple[type[AdapterKind], ...] = get_args(get_args(AdapterSpec)[0])
PEFT_KINDS = {one.peft_type: one for one in KINDS if one.peft_type}
"""Kind by the `peft_type` that its adapters are published with."""


def name_of(kind: type[AdapterKind]) -> str:
    """Return the value of `kind` of a spec: `lora`."""
    name: str = kind.model_fields["kind"].default
    return name


def kinds_with(capability: str) -> str:
    """Return the kinds that have a capability (a flag of `AdapterKind`) as text for a rule: `lora or ia3`."""
    return " or ".join(name_of(one) for one in KINDS if getattr(one, capability))
