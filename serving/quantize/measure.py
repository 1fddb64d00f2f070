"""Measurement of one precision in this process: bytes, perplexity, answers, speed. Called once a process.

The base is loaded by `graftwork.base.load`, as for serving, and everything is asked of the engine that users are served
with, so that what is measured is what is served.
"""

import asyncio
import hashlib
import math
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.base import load
from graftwork.base.load import ResolvedBase
from graftwork.base.model_shape import ModelShape
from graftwork.base.packed_experts import as_parameters
from graftwork.config import canonical_json
from graftwork.datasets.rows import DatasetRow, fingerprint
from graftwork.environment import hardware
from graftwork.errors import BaseModelError, RunError
from graftwork.planning.memory import weight_bytes
from graftwork.prompts.render import PromptSpec
from graftwork.prompts.template import Template
from graftwork.quantization import PRECISIONS, Precision, QuantSpec, default_dtype
from graftwork.report.evaluation_schema import PrecisionFacts
from graftwork.report.schema import Record
from graftwork.serving.api.errors import ApiError
from graftwork.serving.arms import arm_of_row, build_prompt
from graftwork.serving.detokenize import StreamedAnswer, TextStream, generate
from graftwork.serving.engine import Engine
from graftwork.serving.engine.grammar import Grammars, Vocabulary, read_grammar
from graftwork.serving.engine.request import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.models import AdapterSource, trained_prompt
from graftwork.serving.quantize.spec import QuantizeSpec, SpeedSpec
from graftwork.serving.spec import ArmSpec
from graftwork.storage.store import Store

if TYPE_CHECKING:
    from graftwork.serving.engine.engine import NativeEngine


# Record of one precision, which its process writes to the run's folder.


class AnswerText(Record):
    """An answer's text. `cut`: the token limit ended it. `error`: the engine failed on it; it counts as wrong."""

    text: str
    cut: bool = False
    error: str | None = None


class MeasuredArm(Record):
    """One arm at one precision."""

    arm: str
    adapter_version: str | None
    nats: float
    """Mean negative log-likelihood of a token of the text."""
    tokens: int
    """Tokens scored."""
    answers: tuple[AnswerText, ...]
    """In the order of the questions."""
    tokens_per_s: dict[int, tuple[float, ...]]
    """Requests at once -> one value a round."""
    merge_loss: float | None
    """Share of the adapter's delta lost by requantising after a merge (nf4 with an adapter only)."""


class PrecisionResult(PrecisionFacts):
    """One precision, measured in a process of its own."""

    precision: Precision
    base_digest: str
    material: str
    """`Material.digest`: of the questions, the arms with their adapter versions, and the text."""
    arms: tuple[MeasuredArm, ...]


@dataclass(frozen=True)
class Material:
    """Material of all precisions, read once in the driver. `arms` name their adapters by version."""

    arms: tuple[ArmSpec, ...]
    rows: tuple[DatasetRow, ...]
    text_ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """sha256 hex over all of it: a measurement stands for what it was taken on, whatever its files hold now."""
        arms = [arm.model_dump(mode="json") for arm in self.arms]
        parts = canonical_json([arms, fingerprint(self.rows), list(self.text_ids)])
        return hashlib.sha256(parts.encode()).hexdigest()


def measure(spec: QuantizeSpec, precision: Precision, material: Material) -> PrecisionResult:
    """Everything about one precision. Raises UserError for a base or an adapter that cannot be served, RunError."""
    from graftwork.serving.engine.engine import NativeEngine

    threads = spec.engine.num_threads or max(1, int(spec.num_cpus))
    torch.set_num_threads(threads)
    device = "cuda:0" if spec.gpus else "cpu"
    base = load.resolve(spec.base)
    began = time.perf_counter()
    loaded = load.load(base, PRECISIONS[precision], device=device, purpose="serve")
    load_s = time.perf_counter() - began
    adapters = {arm.name: _fetch(spec, base, arm) for arm in material.arms if arm.adapter}
    losses = _merge_losses(loaded.model, precision, adapters)
    template = load.template(base)
    engine = NativeEngine(loaded.model, spec.engine.with_({"num_threads": threads}), device, template.decode)
    arms = _Bench(engine, template, adapters, spec, material).measure(losses)
    return PrecisionResult(
        precision=precision,
        base_digest=base.digest,
        material=material.digest,
        machine=machine(),
        reason=loaded.reason,
        caveat=caveat(precision, device),
        stored_bytes=loaded.stored_bytes,
        resident_bytes=loaded.resident_bytes,
        predicted_bytes=_predicted_bytes(base, precision, loaded.dtype.itemsize),
        load_s=load_s,
        arms=arms,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def machine() -> str:
    """This machine in words: `AMD EPYC 7B13, 2 cores`, and its GPUs."""
    here = hardware()
    return ", ".join([here["cpu"], f"{here['cores']} cores", *(gpu["name"] for gpu in here["gpus"])])


def caveat(precision: Precision, device: str) -> str:
    """Why a precision is no fit for a device although it can be measured there; empty where nothing speaks against."""
    best, why = default_dtype(device)
    if precision == "bf16" and best is not torch.bfloat16:
        return f"bf16 is emulated here ({why}): its speed says nothing about a machine that has it"
    return ""


@dataclass(frozen=True)
class _Adapter:
    version: str
    folder: Path
    trained: PromptSpec
    template_date: date | None


@dataclass(frozen=True)
class _Bench:
    """An engine that has not started, and what it is asked."""

    engine: "NativeEngine"
    template: Template
    adapters: Mapping[str, _Adapter]
    spec: QuantizeSpec
    material: Material

    def measure(self, losses: Mapping[str, float]) -> tuple[MeasuredArm, ...]:
        """All arms. The engine is stopped when this returns."""
        texts = {arm.name: self._perplexity(arm) for arm in self.material.arms}
        self.engine.start()
        try:
            return tuple(self._arm(arm, texts[arm.name], losses.get(arm.name)) for arm in self.material.arms)
        finally:
            self.engine.stop()

    def _perplexity(self, arm: ArmSpec) -> "Perplexity":
        """Through the engine's own layers, adapter included."""
        adapter, weights = self.adapters.get(arm.name), None
        if adapter is not None:
            self.engine.load_adapter(adapter.version, adapter.folder)
            weights = self.engine.pool.copy_to_device(adapter.version, self.engine.runner.device)
        return perplexity(
            self.material.text_ids,
            lambda ids_1T: self.engine.runner.logits(ids_1T, [weights]),
            window=self.spec.text.window,
            stride=self.spec.text.stride,
        )

    def _arm(self, arm: ArmSpec, text: "Perplexity", loss: float | None) -> MeasuredArm:
        spec, vocab, adapter = self.spec, self.template.vocab_size, self.adapters.get(arm.name)
        version = adapter.version if adapter else None
        return MeasuredArm(
            arm=arm.name,
            adapter_version=version,
            nats=text.nats,
            tokens=text.tokens,
            answers=asyncio.run(self._answers(arm, adapter)),
            tokens_per_s={
                rows: tuple(decode_speed(self.engine, rows, spec.speed, adapter=version, vocab=vocab, seed=spec.seed))
                for rows in spec.speed.batches
            },
            merge_loss=loss,
        )

    async def _answers(self, arm: ArmSpec, adapter: _Adapter | None) -> tuple[AnswerText, ...]:
        """The arm's answers in the order of the rows, all in flight at once. Raises DataError for a prompt too long."""
        template = self.template.on(adapter.template_date) if adapter else self.template
        version, trained = (adapter.version, adapter.trained) if adapter else (None, None)
        grammar = Grammars(Vocabulary(template, 0)).compile(read_grammar(arm.grammar)) if arm.grammar else None

        async def answer(row: DatasetRow) -> AnswerText:
            longest = self.spec.engine.max_seq_len
            prompt = build_prompt(arm_of_row(arm, row), row.question, template, max_seq_len=longest, trained=trained)
            params = SamplingParams(max_new_tokens=prompt.max_new_tokens)
            request = GenerateRequest(f"{arm.name} {row.id}", prompt.ids, params, prompt.stop_ids, version, grammar)
            growing = StreamedAnswer(0, prompt, prompt.stop_ids, time.perf_counter(), TextStream(template.decode))
            bursts = generate(self.engine, [request], on_end=lambda: None)
            await anext(bursts)
            try:
                async for events in bursts:
                    growing.add(events[0])
            except ApiError as error:  # the engine failed on this request, e.g. its logits were not finite
                return AnswerText(text=growing.text.text, error=str(error))
            return AnswerText(text=growing.text.text, cut=growing.finish_reason == "length")

        return tuple(await asyncio.gather(*(answer(row) for row in self.material.rows)))


def _fetch(spec: QuantizeSpec, base: ResolvedBase, arm: ArmSpec) -> _Adapter:
    source = AdapterSource(Store(spec.root), base.digest)
    assert arm.adapter is not None, "only arms with an adapter have one to fetch"
    manifest = source.resolve(arm.adapter)
    return _Adapter(manifest.version, source.fetch(manifest), trained_prompt(manifest), manifest.template_date)


def _merge_losses(model: "torch.nn.Module", precision: Precision, adapters: Mapping[str, _Adapter]) -> dict[str, float]:
    """By arm, at 4 bits; before the first forward pass, which repacks the weights on some CPUs."""
    if not PRECISIONS[precision].is_4bit or not adapters:
        return {}

    found = {name: merge_loss(model, PRECISIONS[precision], adapter.folder) for name, adapter in adapters.items()}
    return {name: loss for name, loss in found.items() if loss is not None}


def _predicted_bytes(base: ResolvedBase, precision: Precision, value_bytes: int) -> int | None:
    try:
        return weight_bytes(ModelShape.from_config(base.config), PRECISIONS[precision], value_bytes)
    except BaseModelError:
        return None


# Loss of an adapter's delta when it is merged into 4-bit weights.
#
# A merged weight has to be quantised again: 64 neighbours share one scale and 16 levels, and a delta is mostly smaller
# than half the step between two levels, so most weights round back to where they were. Kept separate from the base,
# nothing of the delta is lost; that is how every adapter is served.


def merge_loss(model: Any, quant: QuantSpec, adapter: Path) -> float | None:
    """||requantised(W + delta) - (W + delta)|| / ||delta|| over all LoRA targets: 0 keeps the delta, 1 loses its size.

    model: a base loaded at `quant` (4 bits) before its first forward pass; given back as it was. W is the base's weight
    as served. None for an adapter without LoRA deltas. Source of the delta: PEFT's `get_delta_weight`.
    """
    from peft import PeftModel

    assert quant.is_4bit, "only 4-bit weights are requantised by a merge"
    with as_parameters(model):
        wrapped = PeftModel.from_pretrained(model, adapter)
    try:
        lost = kept = 0.0
        for weight_OI, delta_OI in _targets(wrapped):
            merged_OI = weight_OI + delta_OI
            lost += float((requantised(merged_OI, quant) - merged_OI).norm()) ** 2
            kept += float(delta_OI.norm()) ** 2
    finally:
        assert wrapped.unload() is model, "the base itself is given back"
    return math.sqrt(lost / kept) if kept else None


def requantised(weight_OI: torch.Tensor, quant: QuantSpec) -> torch.Tensor:
    """Return the weight's values after a 4-bit method as `base.load` applies it: blocks of 64."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight_OI, quant_type=quant.kind, compress_statistics=quant.double_quant)
    plain_OI: torch.Tensor = dequantize_4bit(packed, state)
    return plain_OI


def _targets(wrapped: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(weight as served, delta) of each adapted linear, fp32."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.layer import LoraLayer

    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and module.active_adapters[0] in module.lora_A:
            fused = hasattr(module, "parameter_name")  # PEFT's wrapper of experts' parameters, which gives plain values
            weight = module.get_param() if fused else module.get_base_layer().weight
            state = getattr(weight, "quant_state", None)
            plain = weight.data if state is None else dequantize_4bit(weight.data, state)
            yield plain.float(), module.get_delta_weight(module.active_adapters[0]).float()


# Perplexity of a text in strided windows: exp of the mean nats of each token but the first.
#
# Recipe: the text's ids are read in windows of `window` tokens that start `stride` apart. A window scores the tokens
# that no earlier one has scored; the tokens before them are context. So each token but the text's first is scored once,
# with at least window - stride tokens of context from the second window on. (The strided form in transformers' guide
# "Perplexity of fixed-length models"; it also averages over tokens and not over windows, so that a short last window
# weighs what it holds.) Logits are taken to fp32 before the softmax. Legend: B rows, T tokens, V vocabulary.


Logits = Callable[[torch.Tensor], torch.Tensor]
"""ids [1, T] -> logits [1, T, V]"""


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` in one forward pass; those from `first` on are scored."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Perplexity:
    """The result over `tokens` scored tokens."""

    nats: float
    """Mean negative log-likelihood of a token."""
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.nats)


def windows(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a text of at least two tokens."""
    scored = 1  # nothing predicts the first token
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        yield Window(start, stop, scored)
        scored = stop
        if stop == tokens:
            return


def perplexity(ids: Sequence[int], logits: Logits, *, window: int, stride: int) -> Perplexity:
    """Of the text `ids`. `window` must not pass the longest sequence that the model takes."""
    assert len(ids) >= 2, "a text of one token predicts nothing"
    assert 1 <= stride <= window, f"stride={stride} skips tokens between windows of {window}"
    nats = 0.0
    for one in windows(len(ids), window, stride):
        ids_1T = torch.tensor([ids[one.start : one.stop]])
        nats += _nats(ids_1T, logits(ids_1T), one.first - one.start)
    return Perplexity(nats / (len(ids) - 1), len(ids) - 1)


def _nats(ids_1T: torch.Tensor, logits_1TV: torch.Tensor, first: int) -> float:
    """Summed negative log-likelihood of the tokens from `first` on: position t - 1 predicts token t."""
    predicted_TV = logits_1TV[0, first - 1 : -1].float()
    targets_T = ids_1T[0, first:].to(predicted_TV.device)
    return float(torch.nn.functional.cross_entropy(predicted_TV, targets_T, reduction="sum"))


# Decode speed: tokens per second of N concurrent requests, without prefill and start.


WAIT_S = 900.0


@dataclass
class _Round:
    """Arrival times of each request's tokens, in order of submission, noted in the engine's thread."""

    rows: int
    stamps: dict[str, list[float]] = field(default_factory=dict)
    ended: int = 0
    error: str | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def note(self, event: TokenEvent) -> None:
        self.stamps.setdefault(event.request_id, []).append(time.perf_counter())
        self.error = event.error or self.error
        self.ended += event.finish_reason is not None
        if self.ended == self.rows:
            self.over.set()


def decode_speed(
    engine: Engine, rows: int, spec: SpeedSpec, *, adapter: str | None, vocab: int, seed: int
) -> list[float]:
    """Tokens per second of `rows` requests at once, one value a round, each with prompts of its own.

    The time between the first and the last token of the request that came in last; the earlier ones answer as much
    longer as they may have come in earlier, so that all rows decode in all of these steps. Raises RunError.
    """
    rng = random.Random(seed)
    return [_one_round(engine, rows, spec, adapter, vocab, rng) for _ in range(spec.rounds)]


def _one_round(
    engine: Engine, rows: int, spec: SpeedSpec, adapter: str | None, vocab: int, rng: random.Random
) -> float:
    seen = _Round(rows)
    for row in range(rows):
        ids = tuple(rng.randrange(vocab) for _ in range(spec.prompt_tokens))
        params = SamplingParams(max_new_tokens=spec.new_tokens + rows - 1 - row)
        engine.submit(GenerateRequest(f"speed-{row}", ids, params, adapter=adapter), seen.note)
    if not seen.over.wait(WAIT_S):
        raise RunError(f"decoding {rows} requests at once", f"not done in {WAIT_S:.0f} s", "", "lower speed.batches")
    if seen.error is not None:
        raise RunError(f"decoding {rows} requests at once", seen.error)
    last = max(seen.stamps.values(), key=lambda stamps: stamps[0])
    return rows * (len(last) - 1) / (last[-1] - last[0])
