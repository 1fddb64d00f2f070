"""The loop of several trials: the steps that each would take alone, taken at once."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import set_seed

from graftwork.adapters.lora import LoraSpec
from graftwork.base import load as base_model
from graftwork.errors import RunError
from graftwork.quantization import import_bitsandbytes
from graftwork.training.loop import StepPlan, device_of, plan_of
from graftwork.training.objectives.protocol import Rows
from graftwork.training.objectives.rows import IGNORED, PackedRows
from graftwork.training.objectives.trainer import require_apart, share, trained_logits
from graftwork.training.worker_messages import NonFiniteLoss, StepReport, TrainJob
from graftwork.tuning.multi_lora.layers import (
    Adapted,
    Adapters,
    LinearGroup,
    StackedLoras,
    Trial,
    cut_a,
    cut_b,
    prefer_products,
)

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last names of linears that one input goes through, in the families of transformers. Another input is noticed."""


def attach_together(model: Any, jobs: Mapping[str, TrainJob], steps: int) -> Adapters:
    """Replace the targeted linears of a loaded base. `jobs` by trial; `steps` of each schedule."""
    specs = {key: job.spec for key, job in jobs.items()}
    layers = _create_layers(model, [(spec.adapter, spec.seed) for spec in specs.values()])
    places = _group_linears(layers)
    trials = [
        Trial.create(key, spec.adapter, spec.optim, steps, _flat(layers, places, number))
        for number, (key, spec) in enumerate(specs.items())
        if isinstance(spec.adapter, LoraSpec)
    ]
    adapters = Adapters(trials, places, model.dtype)
    for number, place in enumerate(places):
        siblings = StackedLoras(adapters, number, [layers[name].get_base_layer() for name in place.names])
        for which, name in enumerate(place.names):
            model.set_submodule(name, Adapted(siblings, which))
    return adapters


def _create_layers(model: Any, adapters: Sequence[tuple[Any, int]]) -> dict[str, LoraLayer]:
    """PEFT's layers by name, adapter N of each called `N`, with the weights that PEFT draws for it alone.

    The model itself does not change.
    """
    configs = [adapter.peft_config(model) for adapter, _ in adapters]
    set_seed(adapters[0][1])
    peft = get_peft_model(model, configs[0], adapter_name="0")
    for number, (config, (_, seed)) in enumerate(zip(configs[1:], adapters[1:], strict=True), 1):
        set_seed(seed)
        peft.add_adapter(str(number), config)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    peft.unload()
    return layers


def _group_linears(layers: Mapping[str, LoraLayer]) -> list[LinearGroup]:
    """The layers in the order of the model, those with one input together."""
    together: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        block, _, last = name.rpartition(".")
        names = next((names for names in SAME_INPUT if last in names), (last,))
        together.setdefault((block, names[0]), []).append(name)
    return [
        LinearGroup(
            tuple(names),
            layers[names[0]].lora_A["0"].in_features,
            tuple(layers[name].lora_B["0"].out_features for name in names),
        )
        for names in together.values()
    ]


@torch.no_grad()
def _flat(layers: Mapping[str, LoraLayer], places: Sequence[LinearGroup], number: int) -> torch.Tensor:
    """The weights of one adapter end to end, in fp32."""
    adapter = str(number)
    rank = layers[places[0].names[0]].r[adapter]
    size = rank * sum(len(place.names) * place.inputs + sum(place.outputs) for place in places)
    weights_1P = torch.zeros((1, size), device=layers[places[0].names[0]].lora_A[adapter].weight.device)
    for place, a_1SI, bs_1OR in zip(
        places, cut_a(weights_1P, places, rank), cut_b(weights_1P, places, rank), strict=True
    ):
        a_1SI[0] = torch.cat([layers[name].lora_A[adapter].weight for name in place.names])
        for name, b_1OR in zip(place.names, bs_1OR, strict=True):
            b_1OR[0] = layers[name].lora_B[adapter].weight
    return weights_1P[0]


Reports = Callable[[Mapping[str, StepReport], Mapping[str, RunError]], Mapping[str, bool]]
"""Called with the step of each trial, by its key, and with what ended others since the last call. False stops one."""


def run_together(jobs: Mapping[str, TrainJob], report: Reports) -> None:
    """Train the jobs' adapters on the rows that they share; each two satisfy `group.can_share`.

    A trial whose loss is no number leaves, and so does one that `report` stops; the others continue unchanged.
    `report` is called every `report_every` steps, where one is evaluated, and when a trial is lost. Raises
    BaseModelError, ConfigError.
    """
    job = next(iter(jobs.values()))
    spec, plan = job.spec, plan_of(job, 1)
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    import_bitsandbytes()
    model = base_model.load(base_model.resolve(spec.base), spec.quant, device=device_of(spec), purpose="train").model
    if isinstance(job.data.train, PackedRows):
        require_apart(model)
    prefer_products(model)
    adapters = attach_together(model, jobs, plan.steps)
    if spec.optim.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    run = _GroupRun(job, plan, model, adapters)
    while run.done < plan.steps and adapters.trials:
        run.step(report)


@dataclass
class _GroupRun:
    """Running trials. Tensors of losses have one value per trial, in the adapters' order."""

    job: TrainJob
    plan: StepPlan
    model: Any
    adapters: Adapters
    done: int = 0
    started: float = field(default_factory=time.perf_counter)

    def step(self, report: Reports) -> None:
        """One step of all trials, evaluated and reported where that is due."""
        began = time.perf_counter()
        losses, rates = self._backward(), [trial.lr for trial in self.adapters.trials]
        taken = dict(zip(self._keys(), zip(losses, rates, self.adapters.step(), strict=True), strict=True))
        step_s = time.perf_counter() - began
        self.done += 1
        lost = self._drop_trials({key: loss for key, (loss, _, _) in taken.items()}, "the loss")
        held_out: dict[str, float] = {}
        every = self.job.eval_every or self.job.spec.eval_every
        due = self.done % every == 0 or self.done == self.plan.steps
        if due and self.adapters.trials and self.job.data.eval is not None:
            held_out = dict(zip(self._keys(), self._evaluate(self.job.data.eval), strict=True))
            lost |= self._drop_trials(held_out, "the held-out loss")
        if not (lost or held_out or self.done % self.job.report_every == 0 or self.done == self.plan.steps):
            return
        reports = {key: self._report(taken[key], held_out.get(key), step_s) for key in self._keys()}
        goes_on = report(reports, lost)
        self._keep(lambda key: goes_on[key])

    def _keys(self) -> list[str]:
        return [trial.key for trial in self.adapters.trials]

    def _keep(self, stays: Callable[[str], bool]) -> None:
        staying = [trial for trial in self.adapters.trials if stays(trial.key)]
        if len(staying) < len(self.adapters.trials):
            self.adapters.keep(staying)

    def _drop_trials(self, losses: Mapping[str, float], what: str) -> dict[str, RunError]:
        """Remove the trials whose loss is no number; return the error of each."""
        lost: dict[str, RunError] = {
            key: NonFiniteLoss(
                f"training {self.job.spec.name}, step {self.done} of {self.plan.steps}",
                f"{what} is {loss}",
                "a loss must be finite",
                "lower optim.lr or optim.max_grad_norm; look at the rows of that step",
            )
            for key, loss in losses.items()
            if not math.isfinite(loss)
        }
        self._keep(lambda key: key not in lost)
        return lost

    def _report(self, taken: tuple[float, float, float], held_out: float | None, step_s: float) -> StepReport:
        loss, lr, norm = taken
        elapsed_s = time.perf_counter() - self.started
        tokens = int(self.plan.tokens_S[: self.done].sum())
        return StepReport(self.done, self.plan.steps, loss, lr, norm, tokens, elapsed_s, step_s, held_out)

    def _backward(self) -> list[float]:
        """The loss of each trial over the step's rows, its gradient in the stacks."""
        passes = self.plan.rows_SR[self.done].reshape(self.plan.accumulation, self.plan.micro_batch)
        batches = [self.job.data.train.collate(rows, self.job.data.pad_id) for rows in passes.tolist()]
        scored = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        sums = torch.zeros(self.adapters.copies, device=self.model.device)
        self.model.train()
        for batch in batches:
            losses = self._summed_losses(batch) / scored
            losses.sum().backward()
            sums += losses.detach()
        return self._of_each(sums)

    @torch.no_grad()
    def _evaluate(self, rows: Rows) -> list[float]:
        """Mean loss of each trial over the scored tokens of all rows, as `objectives.sft` measures it."""
        sums = torch.zeros(self.adapters.copies, dtype=torch.float64, device=self.model.device)
        scored = 0
        self.model.eval()
        for indices in share(rows.lengths_N, self.plan.micro_batch, 0, 1):
            batch = rows.collate(indices, self.job.data.pad_id)
            sums += self._summed_losses(batch).double()
            scored += int((batch["labels"][:, 1:] != IGNORED).sum())
        return self._of_each(sums / scored)

    def _summed_losses(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of each copy of the rows, over its scored tokens.

        Without the mask: rows are padded on the right, where a causal model's real tokens don't look.
        """
        copies = self.adapters.copies
        inputs = {key: t.to(self.model.device).repeat(copies, 1) for key, t in batch.items() if key != "attention_mask"}
        logits_NV, targets_N = trained_logits(self.model, self.model.get_output_embeddings(), inputs)
        return summed_losses(logits_NV, targets_N, copies)

    def _of_each(self, of_copies: torch.Tensor) -> list[float]:
        """One value a trial; fresh ones have the same."""
        return [float(value) for value in of_copies.expand(len(self.adapters.trials)).tolist()]


# Losses of several trials from one matrix of logits, which is gone through in parts that stay in a cache.
#
# Legend: N scored positions of all copies, V vocabulary, C copies of the rows.


PART_BYTES = 8 * 2**20
"""Of fp32 logits at a time. 660 positions of a vocabulary of 49,152 would take 390 MB in three copies."""


def summed_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor, copies: int) -> torch.Tensor:
    """Cross-entropy in fp32, summed over each copy's positions: (C)."""
    losses_N = _CrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]  # torch's own
    sums: torch.Tensor = losses_N.view(copies, -1).sum(1)
    return sums


class _CrossEntropy(torch.autograd.Function):
    """Keeps the gradient of the logits, in their own dtype, in place of a copy of them in fp32."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        rows = max(1, PART_BYTES // (4 * logits_NV.shape[1]))
        keep = logits_NV.requires_grad
        gradients_NV = torch.empty_like(logits_NV) if keep else logits_NV
        losses = []
        for start in range(0, len(targets_N), rows):
            part, targets = logits_NV[start : start + rows].float(), targets_N[start : start + rows, None]
            total = part.logsumexp(dim=1, keepdim=True)
            losses.append((total - part.gather(1, targets))[:, 0])
            if keep:
                chances = part.sub_(total).exp_()
                chances.scatter_add_(1, targets, torch.full_like(total, -1.0))
                gradients_NV[start : start + rows] = chances
        ctx.save_for_backward(gradients_NV)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> Any:
        (gradients_NV,) = ctx.saved_tensors
        return gradients_NV * gradient_N[:, None].to(gradients_NV.dtype), None
