"""One precision, measured in this process: bytes, perplexity, answers, speed. Called once a process.

The base is loaded by `base_model.load`, as for serving, and everything is asked of the engine that users are served
with, so that what is measured is what is served.
"""

import hashlib
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork import base_model
from graftwork.base_model import ResolvedBase
from graftwork.chat import PromptSpec, Template
from graftwork.config import canonical_json
from graftwork.data import DatasetRow, fingerprint
from graftwork.errors import BaseModelError
from graftwork.memory import weight_bytes
from graftwork.model_shape import ModelShape
from graftwork.provenance import hardware
from graftwork.serving.quantize.ask import Asker
from graftwork.serving.quantize.measured import MeasuredArm, PrecisionResult
from graftwork.serving.quantize.spec import QUANT, Precision, QuantizeSpec
from graftwork.serving.source import AdapterSource, trained_prompt
from graftwork.serving.spec import ArmSpec
from graftwork.storage import Store

if TYPE_CHECKING:
    import torch

    from graftwork.serving.engine.engine import NativeEngine
    from graftwork.serving.quantize.perplexity import Perplexity


@dataclass(frozen=True)
class Material:
    """What every precision is measured on, read once in the driver. `arms` name their adapters by version."""

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
    import torch

    from graftwork.serving.engine.engine import NativeEngine

    threads = spec.engine.num_threads or max(1, int(spec.num_cpus))
    torch.set_num_threads(threads)
    device = "cuda:0" if spec.gpus else "cpu"
    base = base_model.resolve(spec.base)
    began = time.perf_counter()
    loaded = base_model.load(base, QUANT[precision], device=device, purpose="serve")
    load_s = time.perf_counter() - began
    adapters = {arm.name: _fetch(spec, base, arm) for arm in material.arms if arm.adapter}
    losses = _merge_losses(loaded.model, precision, adapters)
    template = base_model.template(base)
    engine = NativeEngine(loaded.model, spec.engine.with_({"num_threads": threads}), device, template.decode)
    arms = _Bench(engine, template, adapters, spec, material).measure(losses)
    return PrecisionResult(
        precision=precision, base_digest=base.digest, material=material.digest, machine=machine(),
        reason=loaded.reason, caveat=caveat(precision, device),
        stored_bytes=loaded.stored_bytes, resident_bytes=loaded.resident_bytes,
        predicted_bytes=_predicted(base, precision, loaded.dtype.itemsize), load_s=load_s, arms=arms,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip


def machine() -> str:
    """This machine in words: `AMD EPYC 7B13, 2 cores`, and its GPUs."""
    here = hardware()
    return ", ".join([here["cpu"], f"{here['cores']} cores", *(gpu["name"] for gpu in here["gpus"])])


def caveat(precision: Precision, device: str) -> str:
    """Why a precision is no fit for a device although it can be measured there; empty where nothing speaks against."""
    import torch

    best, why = base_model.default_dtype(device)
    if precision == "bf16" and best is not torch.bfloat16:
        return f"bf16 is emulated here ({why}): its speed says nothing about a machine that has it"
    return ""


@dataclass(frozen=True)
class _Adapter:
    version: str
    folder: Path
    trained: PromptSpec
    template_date: date | None


class _Bench:
    """An engine that has not started, and what it is asked."""

    def __init__(
        self,
        engine: "NativeEngine",
        template: Template,
        adapters: Mapping[str, _Adapter],
        spec: QuantizeSpec,
        material: Material,
    ) -> None:
        self._engine, self._template, self._adapters = engine, template, adapters
        self._spec, self._material = spec, material

    def measure(self, losses: Mapping[str, float]) -> tuple[MeasuredArm, ...]:
        """All arms. The engine is stopped when this returns."""
        texts = {arm.name: self._perplexity(arm) for arm in self._material.arms}
        self._engine.start()
        try:
            return tuple(self._arm(arm, texts[arm.name], losses.get(arm.name)) for arm in self._material.arms)
        finally:
            self._engine.stop()

    def _perplexity(self, arm: ArmSpec) -> "Perplexity":
        """Through the engine's own layers, adapter included."""
        from graftwork.serving.quantize.perplexity import perplexity

        adapter, weights = self._adapters.get(arm.name), None
        if adapter is not None:
            self._engine.load_adapter(adapter.version, adapter.folder)
            weights = self._engine.pool.copy_to_device(adapter.version, self._engine.runner.device)
        return perplexity(
            self._material.text_ids, lambda ids_1T: self._engine.runner.logits(ids_1T, [weights]),
            window=self._spec.text.window, stride=self._spec.text.stride,
        )  # fmt: skip

    def _arm(self, arm: ArmSpec, text: "Perplexity", loss: float | None) -> MeasuredArm:
        from graftwork.serving.quantize.speed import decode_speed

        spec, adapter = self._spec, self._adapters.get(arm.name)
        version, trained = (adapter.version, adapter.trained) if adapter else (None, None)
        template = self._template.on(adapter.template_date) if adapter else self._template
        asker = Asker(self._engine, template, spec.engine.max_seq_len)
        answers = asker.ask_all(arm, self._material.rows, version=version, trained=trained)
        vocab = self._template.vocab_size
        speed = {
            rows: tuple(decode_speed(self._engine, rows, spec.speed, adapter=version, vocab=vocab, seed=spec.seed))
            for rows in spec.speed.batches
        }
        return MeasuredArm(arm=arm.name, adapter_version=version, nats=text.nats, tokens=text.tokens,
                           answers=answers, tokens_per_s=speed, merge_loss=loss)  # fmt: skip


def _fetch(spec: QuantizeSpec, base: ResolvedBase, arm: ArmSpec) -> _Adapter:
    source = AdapterSource(Store(spec.root), base.digest)
    assert arm.adapter is not None, "only arms with an adapter have one to fetch"
    manifest = source.resolve(arm.adapter)
    return _Adapter(manifest.version, source.fetch(manifest), trained_prompt(manifest), manifest.template_date)


def _merge_losses(model: "torch.nn.Module", precision: Precision, adapters: Mapping[str, _Adapter]) -> dict[str, float]:
    """By arm, at nf4; before the first forward pass, which repacks the weights on some CPUs."""
    if QUANT[precision].kind != "nf4" or not adapters:
        return {}
    from graftwork.serving.quantize.merge_loss import merge_loss

    found = {name: merge_loss(model, QUANT[precision], adapter.folder) for name, adapter in adapters.items()}
    return {name: loss for name, loss in found.items() if loss is not None}


def _predicted(base: ResolvedBase, precision: Precision, value_bytes: int) -> int | None:
    try:
        return weight_bytes(ModelShape.from_config(base.config), QUANT[precision], value_bytes)
    except BaseModelError:
        return None
