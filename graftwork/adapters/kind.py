"""Properties that an adapter kind has for the rest of the system, and the linear layers that it can target.

No other module compares the name of a kind. A kind is one module of this folder: its spec with its rules, PEFT config,
memory formulas and file format. The class attributes and methods here have the value of most kinds; a kind states where
it differs. docs/extending.md adds one.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.quantization import QuantSpec

if TYPE_CHECKING:
    from peft import PeftConfig

    from graftwork.base.model_shape import ModelShape

FP32 = 4
MODULE_PREFIX = "base_model.model."
"""Start of the names of PEFT's tensors; the module's name in the base follows."""
Shape = tuple[int, ...]

# Linear layers of a base by their function, found by the names of its family.
ATTENTION_WORDS = ("attn", "attention")
MLP_WORDS = ("mlp", "feed_forward", "ffn", "fc")
ATTENTION_ENDS = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense")
MLP_ENDS = ("down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "w2")
"""The last linear of a block."""
KEYS, VALUES = ("k_proj",), ("v_proj",)


class ValueBytes(NamedTuple):
    """Bytes of one value in a forward pass."""

    base: int
    """Of the frozen block: 4 for fp32, 2 for bf16."""
    computed: int
    """Of the adapter's own products: 2 under autocast, else 4."""
    dropout_mask: int
    """4 on a CPU, 1 on a GPU."""


class OptimKeys(Protocol):
    """Keys of `optim` that a kind can constrain."""

    @property
    def lr(self) -> float: ...

    @property
    def model_fields_set(self) -> set[str]: ...


class TrainingKeys(Protocol):
    """Keys of a training spec that a kind can constrain; `training.spec.TrainSpec` has them."""

    @property
    def quant(self) -> QuantSpec: ...

    @property
    def optim(self) -> OptimKeys: ...

    @property
    def init_from(self) -> str | None: ...


class AdapterKind(Spec):
    """Common part of the specs of all kinds."""

    peft_type: ClassVar[str] = ""
    """`peft_type` of its adapter_config.json; empty where no adapter is published."""
    learning_rates: ClassVar[tuple[float, float]]
    """Range of `optim.lr` that a sweep without a space draws from, two decades around a measured value."""
    trains_base: ClassVar[bool] = False
    """The base's own weights are trained, in fp32, and a base is published."""
    trains_tokens: ClassVar[bool] = False
    """Embedding rows of single tokens can be trained with it."""
    trains_score_head: ClassVar[bool] = False
    """A reward model's head can be trained and saved with it."""
    trains_matrices: ClassVar[bool] = True
    """Some trained weight is a matrix that multiplies activations."""
    has_rank: ClassVar[bool] = False
    """Its size is the key `rank`."""

    @property
    def virtual_tokens(self) -> int:
        """Trained keys and values before each sequence."""
        return 0

    @property
    def input_dropout(self) -> float:
        """Share of the targets' inputs that training drops."""
        return 0.0

    @property
    def reads_base_weights(self) -> bool:
        """Return whether a forward pass of training computes with the base's whole weights (DoRA's norm)."""
        return False

    @property
    def adds_up(self) -> bool:
        """Return whether two of them on one base equal a third: plain low-rank deltas."""
        return False

    def describe(self) -> str:
        """Return the adapter in a few words."""
        raise NotImplementedError

    def check_run(self, run: TrainingKeys) -> None:
        """Raise ValueError where a key of the training spec cannot go with this kind."""

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise ValueError for an adapter_config.json of this kind that PEFT would not write."""

    @classmethod
    def tensor_problems(cls, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Iterator[str]:
        """Yield the problems of the tensors of a weights file of this kind, one sentence each."""
        yield from ()

    def peft_config(self, model: Any) -> "PeftConfig":
        """Return PEFT's config for this model. Raises ConfigError where the model has no layer to adapt."""
        raise NotImplementedError

    def begin(self, attached: Any) -> None:
        """Set the start values of the trained weights where they differ from PEFT's."""

    def trained_params(self, model: "ModelShape") -> int:
        """Return the number of trained values, each with a gradient and the optimizer's state."""
        raise NotImplementedError

    def token_params(self, model: "ModelShape") -> float:
        """Return the trained values that one token is multiplied with: 6 operations each in a step."""
        return self.trained_params(model)

    def saved_bytes(self, model: "ModelShape", size: ValueBytes) -> float:
        """Return the bytes that one token leaves in one block for the backward pass, next to the frozen block's."""
        raise NotImplementedError

    def saved_weights(self, model: "ModelShape") -> float:
        """Return the changed weights of all blocks that a forward pass keeps, whatever its tokens."""
        return 0.0

    def dropped_inputs(self, model: "ModelShape") -> int:
        """Return the values of one token that pass the dropout of training, in all blocks."""
        return 0

    def weight_flops(self, model: "ModelShape") -> float:
        """Return the operations of one forward pass of training that do not depend on its tokens."""
        return 0.0

    def weight_scratch_bytes(self, model: "ModelShape", *, autocast: bool) -> int:
        """Return the bytes that the operations of `weight_flops` have at once."""
        return 0


def linears(model: Any) -> list[str]:
    """Full names of the linear layers, the head left out."""
    import torch  # not above: plans read the names alone

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def text_linears(model: Any) -> list[str]:
    """Full names of the linear layers of the text decoder: towers for images and sound are left out, and the head."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    return [name for name in linears(model) if id(model.get_submodule(name)) in decoder]


def within(asked: str, words: tuple[str, ...], model: Any) -> list[str]:
    """Full names of the linear layers in whose names one of the words stands. Raises ConfigError for none."""
    found = [name for name in text_linears(model) if any(word in name.lower() for word in words)]
    if not found:
        raise _no_target(asked, f"no linear layer of {type(model).__name__} is in such a block", model)
    return found


def ends(asked: str, names: tuple[str, ...], model: Any) -> list[str]:
    """Those of the names that layers of the model end in, as PEFT takes them for targets. Raises ConfigError for none.

    Of a model with towers for images and sound the full names: theirs end alike. `asked` begins the error.
    """
    known = text_linears(model)
    found = [name for name in names if any(layer.endswith(f".{name}") for layer in known)]
    if not found:
        raise _no_target(asked, f"{type(model).__name__} has no layer named {', '.join(names)}", model)
    if len(known) < len(linears(model)):
        return [layer for layer in known if layer.endswith(tuple(f".{name}" for name in found))]
    return found


def _no_target(asked: str, problem: str, model: Any) -> ConfigError:
    known = sorted({name.rsplit(".", 1)[-1] for name in linears(model)})
    rule = f"its linear layers: {', '.join(known)}"
    return ConfigError(asked, problem, rule, "set adapter.kind=lora and adapter.targets=all-linear")
