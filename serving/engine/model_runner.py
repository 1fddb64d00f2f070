"""Forward passes of a transformers decoder over packed tokens, with the engine's attention, KV and adapters.

The model stays a transformers model: its attention implementation is set to ours and its linears are hooked; `close`
undoes both. Decoding tokens are computed with the prompts in one pass (a CPU), or by graphs of their own (a GPU).
While decoding, norms and gated MLPs are one kernel each: a module takes part if its result on random rows equals the
formula bit for bit.
Legend: B rows of a batch, T tokens, V vocabulary, N chosen tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import silu

from graftwork.base.meta_model import is_recurrent
from graftwork.base.support import PROBE_LENGTH, mixed_share, most_mixed, probe_ids
from graftwork.compat.hf import attention_name, set_attention
from graftwork.errors import BaseModelError
from graftwork.serving.engine import attention
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.kinds import MixedKinds
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.attention import Chunk, StepBatch, inverse, pack
from graftwork.serving.engine.cpu.host_tuning import PiecewiseOutput
from graftwork.serving.engine.cpu.kernels import fits, kernels_for
from graftwork.serving.engine.expert_layers import ExpertLayers
from graftwork.serving.engine.kv_cache import KvShape, KvStore, longest_sequence
from graftwork.serving.engine.lora_batch import DeltaPlanner
from graftwork.serving.engine.lora_layers import Deltas, LoraSegment, Sites

if TYPE_CHECKING:
    from graftwork.serving.engine.cuda.graph_decode import GraphDecode  # imports Triton


class DecodeInputs(attention.OwnAttention, Protocol):
    """Packed tokens of a pass, as the model takes them, which attend by themselves."""

    @property
    def ids_1T(self) -> torch.Tensor: ...
    @property
    def positions_1T(self) -> torch.Tensor: ...


_PROBE_ROWS = 2


class RowKernels(Protocol):
    """The kernels of a device. Inputs are contiguous."""

    def rms_norm(self, x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, /) -> torch.Tensor:
        """`weight * (x / sqrt(mean(x * x) + eps))` of each row, the quotient rounded to x's dtype first."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor, /) -> torch.Tensor:
        """`silu(gate) * up`, of equal shapes [..., I]."""


class DecodeLayers:
    """The modules of one model that take part. dtype: of its tokens."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, kernels: RowKernels) -> None:
        self._kernels = kernels
        self.norms = [module for module in model.modules() if _is_rms_norm(module, dtype)]
        self.mlps = [module for module in model.modules() if _is_gated_mlp(module, dtype)]

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it, the modules use the kernels."""
        try:
            for module in self.norms:
                module.forward = partial(_norm, self._kernels, module)
            for module in self.mlps:
                module.forward = partial(_mlp, self._kernels, module)
            yield
        finally:
            for module in (*self.norms, *self.mlps):
                module.__dict__.pop("forward", None)


def _norm(kernels: RowKernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    return kernels.rms_norm(x.reshape(-1, x.shape[-1]), module.weight, module.variance_epsilon).view(x.shape)


def _mlp(kernels: RowKernels, module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.down_proj(kernels.gated(module.gate_proj(x), module.up_proj(x)))
    return result


@torch.inference_mode()
def _is_rms_norm(module: Any, dtype: torch.dtype) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(eps, float) or not isinstance(weight, torch.Tensor) or "forward" in module.__dict__:
        return False
    if weight.dim() != 1 or weight.dtype != dtype:
        return False
    if not _takes_one(module):
        return False
    for x_NH in _probes(len(weight), weight.device, dtype):
        wide_NH = x_NH.float()
        scaled_NH = wide_NH * torch.rsqrt(wide_NH.pow(2).mean(-1, keepdim=True) + eps)
        if not torch.equal(module(x_NH), weight * scaled_NH.to(dtype)):
            return False
    return True


@torch.inference_mode()
def _is_gated_mlp(module: Any, dtype: torch.dtype) -> bool:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    if "forward" in module.__dict__ or not isinstance(module.gate_proj, torch.nn.Linear) or not _takes_one(module):
        return False
    return all(
        torch.equal(module(x_NH), module.down_proj(silu(module.gate_proj(x_NH)) * module.up_proj(x_NH)))
        for x_NH in _probes(module.gate_proj.in_features, module.gate_proj.weight.device, dtype)
    )


def _takes_one(module: Any) -> bool:
    """True: a module is called with its input alone: a gated norm has another argument."""
    return len(signature(type(module).forward).parameters) == 2


def _probes(size: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Usual values, and large ones, for which a module that clamps them differs from the formula."""
    x_NH = torch.randn(_PROBE_ROWS, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return [x_NH, 1e3 * x_NH]


KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Of `layer_types` in a configuration. Others attend to other positions, or keep a state of another kind."""


def most_packed(config: Any) -> int | None:
    """Tokens of a pass at most; None: no limit. Llama-4 scales queries by a token's place in the pass from there on."""
    return int(config.floor_scale) - 1 if getattr(config, "attn_temperature_tuning", None) else None


class Runner:
    """Owns the prepared model. BaseModelError for a decoder whose attention is not called through transformers.

    graph_decode: computes decoding tokens in its own way; None computes them with the prompts. places: how many
    adapters of a rank bucket are laid out for that.
    """

    def __init__(self, model: Any, device: str, graph_decode: "GraphDecode | None" = None, places: int = 0) -> None:
        self.model, self.device = model, torch.device(device)
        self.config = model.config.get_text_config()
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.max_positions, self.position_rule = longest_sequence(self.config)
        attention.register()
        self._own_attention = attention_name(self.config)
        self._was_training = model.training
        set_attention(self.config, attention.NAME)
        model.eval()
        self.graph_decode = graph_decode
        self.sites = Sites(model, None if graph_decode is None else graph_decode.forward_of)
        self._output = PiecewiseOutput(model.get_output_embeddings())
        self._kernels = kernels_for(self.dtype) if self.device.type == "cpu" else None
        self.planner = DeltaPlanner(self.sites.groups(), self.dtype, self.device, places, self._kernels)
        self.experts = ExpertLayers(model)
        self.kinds = MixedKinds(model, self.sites, self.experts, self.planner, self.device)
        try:
            self._require_known_layers()
            self.kv_shapes = self._probe()
            if self.device.type != "meta":  # shapes alone, without values to compare
                self._require_apart()
            self._layers = None if self._kernels is None else DecodeLayers(model, self.dtype, self._kernels)
        except BaseException:
            self.close()
            raise
        self.base = BaseView(model, self.sites.shapes, self.kv_shapes)

    @property
    def kv_dtype(self) -> torch.dtype:
        """The model's; float32 where PyTorch attends on a CPU, for which it is faster than 16 bits."""
        own = self._kernels is not None and all(fits(shape.head_dim) for shape in self.kv_shapes)
        return torch.float32 if self.device.type == "cpu" and not own else self.dtype

    def step(
        self,
        kv: KvStore,
        decoding: Sequence[Chunk],
        prompts: Sequence[Chunk],
        adapters: tuple[Sequence[LoadedAdapter | None], Sequence[LoadedAdapter | None]],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Logits [N, V] at the packed positions `wanted`, which hold every decoding token's.

        adapters: of each decoding chunk and of each prompt chunk.
        """
        if self.graph_decode is not None:
            return self._step_by_graph(self.graph_decode, kv, decoding, prompts, adapters, wanted)
        decoders, prefills = adapters
        order = self.planner.order(decoders) if any(decoders) else None
        batch = pack(decoding, prompts, kv, self.device, order, self._kernels)
        if order is not None:
            decoders = [decoders[n] for n in order]
            packed = [*inverse(order), *range(len(order), max(wanted) + 1)]
            wanted = [packed[place] for place in wanted]
        if prompts or self._layers is None:  # prompts are computed as peft computes them, bit for bit
            return self.forward(batch, decoders, prefills, wanted)
        with self._layers.decoding():
            return self.forward(batch, decoders, prefills, wanted)

    def _step_by_graph(
        self,
        graph_decode: "GraphDecode",
        kv: KvStore,
        decoding: Sequence[Chunk],
        prompts: Sequence[Chunk],
        adapters: tuple[Sequence[LoadedAdapter | None], Sequence[LoadedAdapter | None]],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Decoding tokens by `graph_decode` where it supports their adapters, the others with the prompts."""
        fast = [n for n, weights in enumerate(adapters[0]) if graph_decode.supports(weights)]
        slow = [n for n, weights in enumerate(adapters[0]) if not graph_decode.supports(weights)]
        parts = []
        if fast:
            parts.append(graph_decode.logits([decoding[n] for n in fast], [adapters[0][n] for n in fast]))
        if slow or prompts:
            batch = pack([decoding[n] for n in slow], prompts, kv, self.device)
            shift = len(slow) - len(decoding)
            graph_decode.wait_uploads([*(adapters[0][n] for n in slow), *adapters[1]])
            ends = [*range(len(slow)), *(place + shift for place in wanted[len(decoding) :])]
            parts.append(self.forward(batch, [adapters[0][n] for n in slow], adapters[1], ends))
        logits_NV = torch.cat(parts) if len(parts) > 1 else parts[0]
        places = [*fast, *slow, *range(len(decoding), len(wanted))]
        if not slow:
            return logits_NV
        return torch.empty_like(logits_NV).index_copy_(0, torch.tensor(places, device=self.device), logits_NV)

    @torch.inference_mode()
    def forward(
        self,
        batch: StepBatch,
        decoding: Sequence[LoadedAdapter | None],
        prompts: Sequence[LoadedAdapter | None],
        wanted: Sequence[int],
    ) -> torch.Tensor:
        """Logits [N, V] at the packed positions `wanted`. decoding, prompts: the adapter of each chunk of the batch."""
        wanted_N = torch.tensor(wanted, dtype=torch.long, device=self.device)
        adapters = {weights for half in (decoding, prompts) for weights in half if weights is not None}
        if not adapters:
            return self.run(batch, None, wanted_N)[0]
        segments = _lora_segments(batch, prompts)
        if all(weights.only_lora for weights in adapters):
            return self.run(batch, self.planner.plan(decoding, segments), wanted_N)[0]
        with self.kinds.step(batch, decoding, prompts, segments, wanted) as deltas:
            return self.run(batch, deltas, wanted_N)[0]

    @torch.inference_mode()
    def logits(self, ids_BT: torch.Tensor, adapters: Sequence[LoadedAdapter | None]) -> torch.Tensor:
        """Logits [B, T, V] of whole rows through the prompt path, without KV.

        Rows of one adapter that stand together are computed as peft computes them: equal bit for bit at equal shape.
        """
        assert all(weights is None or weights.virtual_tokens is None for weights in adapters), "virtual tokens need KV"
        rows = [Chunk(row.tolist(), 0, None) for row in ids_BT]
        batch = pack([], rows, None, self.device)
        self._output.on = False
        try:
            logits_TV = self.forward(batch, [], adapters, range(ids_BT.numel()))
        finally:
            self._output.on = True
        return logits_TV.view(*ids_BT.shape, -1)

    def new_kv(self, tokens: int, max_len: int) -> KvStore:
        """Key-value memory that fits this model."""
        return KvStore(self.kv_shapes, tokens, max_len, self.kv_dtype, self.device)

    def forget(self, version: str) -> None:
        """Drops references to an adapter that has left the device."""
        self.planner.forget(version)
        self.kinds.forget(version)
        if self.graph_decode is not None:
            self.graph_decode.forget(version)

    def close(self) -> None:
        """Gives the model back as it was."""
        self.sites.unhook()
        self.experts.unhook()
        self._output.unhook()
        set_attention(self.config, self._own_attention)
        self.model.train(self._was_training)

    def run(self, batch: StepBatch | DecodeInputs, deltas: Deltas | None, wanted_N: torch.Tensor | int) -> torch.Tensor:
        """Logits [1, N, V] of one pass; wanted_N=0: of every token."""
        self.sites.deltas = deltas
        try:
            with attention.attending(batch):
                output = self.model(
                    input_ids=batch.ids_1T, position_ids=batch.positions_1T, use_cache=False, logits_to_keep=wanted_N
                )
        finally:
            self.sites.deltas = None
        logits: torch.Tensor = output.logits
        return logits

    @torch.inference_mode()
    def _probe(self) -> list[KvShape]:
        """Runs two tokens, to learn each layer's key-value heads and that every layer's attention comes to us."""
        batch = pack([], [Chunk((0, 0), 0, None)], None, self.device)
        try:
            self.run(batch, None, torch.tensor([1], device=self.device))
        except (TypeError, KeyError, AttributeError) as error:
            problem = f"its code does not take a pass of the engine ({type(error).__name__}: {error})"
            rule = "a served decoder takes logits_to_keep, and attends through transformers' attention interface"
            raise BaseModelError(type(self.model).__name__, problem, rule) from error
        seen, layers = batch.seen, int(self.config.num_hidden_layers)
        if sorted(seen) != list(range(layers)):
            found = f"{len(seen)} of {layers} layers attend through transformers' attention interface"
            raise BaseModelError(type(self.model).__name__, found, "every layer of a served decoder does")
        return [seen[layer] for layer in range(layers)]

    def _require_known_layers(self) -> None:
        if is_recurrent(self.config):
            found, rule = "recurrent layers", "the engine keeps keys and values, and no other state from token to token"
            raise BaseModelError(type(self.model).__name__, found, rule)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if unknown := sorted(kinds - KNOWN_LAYERS):
            rule = f"the engine attends in layers of types {' and '.join(sorted(KNOWN_LAYERS))}"
            raise BaseModelError(type(self.model).__name__, f"layers of type {', '.join(unknown)}", rule)

    @torch.inference_mode()
    def _require_apart(self) -> None:
        """Try two requests in one pass: state that goes from token to token next to keys and values would mix them."""
        ids = probe_ids(self.vocab_size)
        first, second = ids[:PROBE_LENGTH], ids[PROBE_LENGTH:]

        def logits_of(*rows: list[int]) -> torch.Tensor:
            batch = pack([], [Chunk(row, 0, None) for row in rows], None, self.device)
            tokens = batch.ids_1T.shape[1]
            last = torch.arange(tokens - PROBE_LENGTH, tokens, device=self.device)
            return self.run(batch, None, last)[0].float()

        mixed = mixed_share(alone=logits_of(second), one=logits_of(ids), two=logits_of(first, second))
        if mixed > most_mixed(self.model):
            found = f"a request's logits depend on the request before it ({mixed:.0%} as much as one text would)"
            raise BaseModelError(type(self.model).__name__, found, "requests of one pass are computed apart")


def _lora_segments(batch: StepBatch, adapters: Sequence[LoadedAdapter | None]) -> list[LoraSegment]:
    """Neighbouring prompt chunks of one adapter as one segment."""
    segments: list[LoraSegment] = []
    for segment, weights in zip(batch.segments, adapters, strict=True):
        stop = segment.first + segment.count
        if segments and segments[-1].weights is weights and segments[-1].stop == segment.first:
            segments[-1] = LoraSegment(segments[-1].first, stop, segments[-1].weights)
        elif weights is not None:
            segments.append(LoraSegment(segment.first, stop, weights))
    return segments
