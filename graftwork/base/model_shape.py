"""Sizes of a base model, counted on its real class without weights: the source of predicted memory and time.

`graftwork.base.meta_model` counts them on the meta device. The result is cached by the digest of the config and the
versions of transformers and PEFT, so that a plan of a known base imports neither of them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from typing import Any, Literal, cast

from pydantic import TypeAdapter

from graftwork.adapters.kind import MLP_ENDS
from graftwork.adapters.target_modules import TargetModules, choose_linears
from graftwork.config import canonical_json
from graftwork.errors import BaseModelError, GraftworkError
from graftwork.storage.store import Store, cache_root

Targets = Literal["all-linear", "attention", "mlp"]
FORMAT = 16
"""Of a cached entry; raise it when the way of counting changes. The names of the fields below are part of its key."""


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and size: y_O = W_OI x_I."""

    name: str
    """Path in the model, with `*` in place of numbers: `model.layers.*.self_attn.q_proj`."""
    inputs: int
    outputs: int
    count: int
    """Layers of that name in the whole model."""
    part: Literal["attention", "mlp", "other", "outside"]
    """`outside`: of the text decoder, in a tower for images or sound."""
    blocks: tuple[int, ...] = field(default=(), compare=False)
    """Numbers in place of the first `*`, one a layer; empty where several layers have one."""

    @property
    def params(self) -> int:
        """Weights of one layer, the bias left out."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a base: its parameters, its linear layers, and those on which PEFT puts an adapter."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP between its linears."""
    vocab: int
    tied: bool
    """The head is the embedding."""
    params: int
    """Of the whole model; tied ones count once."""
    linears: tuple[Linear, ...]
    """All linear layers but the head: the weights that nf4 and int8 pack."""
    adapted: Mapping[Targets, tuple[Linear, ...]]
    """The linear layers that get a LoRA, by `adapter.targets`; empty where PEFT cannot attach one."""
    kv_values: int
    """Values that one token leaves as keys and values in all layers."""
    outside_params: int = 0
    """Of these, outside of the text decoder and the head: frozen whatever is trained."""
    file_bytes: int = 2
    """Bytes of a weight in the checkpoint's file."""
    packed_params: int = 0
    """Weights of the linears that a quantised checkpoint packs."""
    packed_bytes: int = 0
    """Bytes of those in the checkpoint, scales included."""
    experts: tuple[Linear, ...] = ()
    """Matrices of experts in parameters of three dimensions, one layer an expert; no part of `linears`."""
    qk_norm: bool = False
    """Queries and keys are normalised, each norm with an input of its own."""
    num_experts: int = 1
    """Experts of one block."""
    experts_per_token: int = 1
    """Experts that one token passes in a block (`num_experts_per_tok`)."""
    norms: float = 2.0
    """Norms of the hidden size in one block, two at least."""
    gate_values: float = 1.5
    """Values that the gate of an expert leaves for each output of its first projection."""
    eager: bool = False
    """Training uses transformers' eager attention."""
    score_bytes: tuple[float, float] = (0.0, 0.0)
    """Bytes that one block keeps for each query, key and head, with a base in fp32 and in 16 bits: of eager attention,
    and of sdpa on a CPU where keys and values differ in size. 0 where no matrix of scores is kept."""
    latent_size: int = 0
    """Size of queries, keys and values of multi-head latent attention, on average; 0 for attention of another form."""
    latent_ranks: int = 0
    """Inputs of its norms."""
    latent_rest: int = 0
    """Values of one token in the result of its `kv_b_proj` that are copied into the keys, and stay with the values."""
    router_loss: bool = False
    """TRL 1.16 adds the load-balancing loss of a router to the objective's (`aux_loss_enabled` of its trainers)."""
    unplanned: str = ""
    """The reason for which no formula predicts the activations of a training step; empty where one does."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Return the sizes of the base with this config.json.

        Raises BaseModelError where transformers has no causal language model for it.
        """
        return facts_of(config).shape

    def require_planned(self, asked: str) -> None:
        """Raise BaseModelError where no formula predicts the activations of a training step."""
        if self.unplanned:
            raise BaseModelError(
                asked,
                self.unplanned,
                "memory of training is predicted for decoders whose blocks are one attention and one MLP",
                HOW_UNPLANNED,
            )

    @property
    def q_size(self) -> int:
        return self.latent_size or self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.latent_size or self.kv_heads * self.head_dim

    @property
    def keeps_scores(self) -> bool:
        """Return whether a block keeps a matrix of scores for the backward pass."""
        return self.score_bytes[0] > 0

    def on_gpu(self, *, trains_base: bool = False) -> "ModelShape":
        """The sizes on a GPU, whose kernels keep no scores of sdpa in any form.

        trains_base: in 16 bits scores are then those of fp32, of the mask's dtype, and autocast's copy: a bound.
        """
        wide, narrow = self.score_bytes if self.eager else (0.0, 0.0)
        return replace(self, score_bytes=(wide, wide + 2 if trains_base and self.eager else narrow))

    @property
    def gated(self) -> bool:
        """Return whether the MLP multiplies two projections of its input, as SwiGLU does."""
        wide = sum(x.outputs * x.count for x in self.linears if x.part == "mlp" and x.inputs == self.hidden)
        return wide > self.layers * self.intermediate

    def match_layers(self, ends: tuple[str, ...]) -> tuple[Linear, ...]:
        """The linear layers whose path ends in one of the names, as PEFT matches them."""
        return tuple(x for x in self.linears if x.part != "outside" and any(x.name.endswith(f".{end}") for end in ends))

    def adapted_linears(self, which: Targets | TargetModules) -> tuple[Linear, ...]:
        """The linear layers of `adapter.targets` or `adapter.target_modules`. Raises ConfigError for a name of none."""
        if which in self.adapted:
            return self.adapted[cast(Targets, which)]
        return choose_linears(which, self.adapted["all-linear"], "the base")

    def read(self, which: Targets | TargetModules) -> int:
        """Values of one token and block that the targets read, each once; the attention's own output is left out."""
        targets = self.adapted_linears(which)
        parts = {x.part for x in targets if x.inputs == self.hidden and not x.name.endswith(ATTENTION_OUTPUTS)}
        inner = any(x.part == "mlp" and x.inputs == self.intermediate for x in targets)
        latent = sum(x.inputs for x in targets if x.name.endswith(LATENT_INPUTS))
        return self.hidden * len(parts) + self.intermediate * inner + latent

    @property
    def linear_params(self) -> int:
        """Weights of the linears, which are quantised."""
        return sum(x.count * x.params for x in self.linears)

    @property
    def expert_params(self) -> int:
        """Weights of all experts."""
        return sum(x.count * x.params for x in self.experts)

    @property
    def active_experts(self) -> float:
        """Share of the experts that one token passes."""
        return self.experts_per_token / self.num_experts

    @property
    def expert_blocks(self) -> int:
        """Blocks with experts."""
        return self.experts[0].count // self.num_experts if self.experts else 0

    @property
    def expert_inputs(self) -> float:
        """Inputs of the experts that one token passes, on average over the blocks."""
        return sum(x.inputs * x.count for x in self.experts) * self.active_experts / self.layers

    @property
    def mlp_values(self) -> float:
        """Values that one token leaves in the MLP of one frozen block, on average over the blocks.

        gate, silu(gate) and up, or an activation's input; of experts their results too, which the router weighs.
        """
        if not self.experts:
            return (3 if self.gated else 1) * self.intermediate
        plain = sum(3 * x.inputs * x.count for x in self.linears if x.part == "mlp" and x.name.endswith(MLP_OUTPUTS))
        gate = self.gate_values
        passed = sum((1.0 if x.name.endswith(MLP_OUTPUTS) else gate) * x.outputs * x.count for x in self.experts)
        return (plain + passed * self.active_experts) / self.layers

    @property
    def mlp_gradients(self) -> int:
        """Values of one token that the backward pass of one MLP has at once: of inner activations and two streams."""
        plain = 3 * self.intermediate + 2 * self.hidden
        inner = max((x.outputs for x in self.experts if not x.name.endswith(MLP_OUTPUTS)), default=0)
        return max(plain, self.experts_per_token * max(inner + self.hidden, 3 * self.hidden) if self.experts else 0)

    @property
    def active_linear_params(self) -> int:
        """Weights that one token is multiplied with, the head left out: the N of the FLOP count."""
        return self.linear_params + round(self.expert_params * self.active_experts)

    @property
    def active_params(self) -> int:
        """Parameters of the model without the experts that one token does not pass."""
        return self.params - round(self.expert_params * (1 - self.active_experts))

    def describe_experts(self) -> str:
        """Return the parameters as text, in total and of one token; empty for a dense base."""
        if not self.experts:
            return ""
        share = f"{self.experts_per_token} of {self.num_experts} experts"
        return f"{self.params / 1e9:.3g}B parameters, {self.active_params / 1e9:.3g}B active per token ({share})"

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def plain_params(self) -> int:
        """Embedding, head, norms, biases, experts: no linear layers."""
        return self.params - self.linear_params

    def adapter_params(self, rank: int, which: Targets | TargetModules = "all-linear", *, experts: bool = False) -> int:
        """A (r x in) and B (out x r) of each target, and of each expert where they are adapted."""
        targets = (*self.adapted_linears(which), *(self.experts if experts else ()))
        return sum(x.count * rank * (x.inputs + x.outputs) for x in targets)


MLP_OUTPUTS = tuple(f".{end}" for end in MLP_ENDS)
"""Ends of the names of the MLP's last linear."""
HOW_UNPLANNED = (
    "set optim.micro_batch and optim.gradient_checkpointing to values; the run's report shows the peak that they take"
)
LATENT_INPUTS = (".q_b_proj", ".kv_b_proj")
"""Ends of the names of the linears behind the norms of multi-head latent attention."""
ATTENTION_OUTPUTS = (".o_proj", ".out_proj", ".dense", ".c_proj")
"""Ends of the names of the attention's last linear, whose input is the attention's own output."""


@dataclass(frozen=True)
class BaseFacts:
    """Sizes and traits of a base. `graftwork.base.support` derives from them the stages that support it."""

    shape: ModelShape
    model_type: str
    model_class: str
    attention: Literal["sdpa", "eager"]
    """The attention of transformers that training uses."""
    fixed: tuple[str, ...]
    """Linear layers without an adapter: routers, and experts that are linear layers."""
    unadapted_experts: str
    """The reason for which no LoRA of experts is trained and served; empty where one is, and for a dense base."""
    recurrent: bool
    """Some layers carry a state from token to token besides keys and values."""
    transposed: bool
    """The linears store [in, out], as GPT-2's do."""
    packs: bool
    """The masks of its attention follow the positions of documents that are packed into one row."""
    reads_weights: str
    """The error of a training step that uses the weights of linears by itself while they are packed; mostly empty."""
    bodied: bool
    """transformers finds the decoder below the output head (`base_model`), as TRL's losses need it."""
    unattached: Mapping[Targets, str]
    """The reason for which PEFT cannot attach a LoRA, by `adapter.targets`."""
    unserved: str
    """The reason for which the serving engine cannot run it; empty where it can."""


_FACTS = TypeAdapter(BaseFacts)


def facts_of(config: Mapping[str, Any]) -> BaseFacts:
    """Return the facts of the base with this config.json, from the cache or counted now (about 7 s).

    Writes `<cache>/shapes/<digest>.json`. Raises BaseModelError where transformers has no causal language model for it.
    """
    decides = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    versions = {name: version(name) for name in ("transformers", "peft")}
    form = [FORMAT, *(one.name for kind in (BaseFacts, ModelShape, Linear) for one in fields(kind))]
    digest = hashlib.sha256(canonical_json([form, versions, decides]).encode()).hexdigest()
    store, name = Store(str(cache_root())), f"{digest}.json"
    if store.exists("shapes", name):
        return _FACTS.validate_json(store.read_text("shapes", name))
    from graftwork.base.meta_model import count  # imports torch, transformers and PEFT

    try:
        facts = count(config)
    except GraftworkError:
        raise
    except Exception as error:  # code of any architecture
        what, found = f"base of model_type={config.get('model_type')!r}", str(error).strip().splitlines() or [""]
        problem = (
            f"transformers {versions['transformers']} builds it, but no step runs ({type(error).__name__}: {found[0]})"
        )
        raise BaseModelError(what, problem[:400], "a base is a causal language model", "take another base") from error
    store.write_bytes(_FACTS.dump_json(facts, indent=1), "shapes", name)
    return facts
