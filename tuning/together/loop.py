"""The loop of several trials: the steps that each would take alone, taken at once."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from graftwork import base_model
from graftwork.errors import RunError
from graftwork.step_plan import StepPlan
from graftwork.training.job import NonFiniteLoss, TrainJob
from graftwork.training.logits import trained_logits
from graftwork.training.loop import device_of, plan_of
from graftwork.training.objectives.share import share
from graftwork.training.rows.packed import PackedRows
from graftwork.training.rows.token_rows import IGNORED, Rows
from graftwork.training.steplog import StepReport
from graftwork.tuning.together.adapters import Adapters
from graftwork.tuning.together.attach import attach_together
from graftwork.tuning.together.attention import prefer_products
from graftwork.tuning.together.losses import summed_losses

Reports = Callable[[Mapping[str, StepReport], Mapping[str, RunError]], Mapping[str, bool]]
"""Called with the step of each trial, by its key, and with what ended others since the last call. False stops one."""


def run_together(jobs: Mapping[str, TrainJob], report: Reports) -> None:
    """Train the jobs' adapters on the rows that they share; `rule.can_share` holds for each two. A trial whose loss is
    no number leaves, and so does one that `report` stops; the others go on as they would have.

    `report` is called every `report_every` steps, where one is evaluated, and when a trial is lost. Raises
    BaseModelError, ConfigError.
    """
    job = next(iter(jobs.values()))
    spec, plan = job.spec, plan_of(job, 1)
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    base_model.import_bitsandbytes()
    model = base_model.load(base_model.resolve(spec.base), spec.quant, device=device_of(spec), purpose="train").model
    if isinstance(job.data.train, PackedRows):
        from graftwork.training.objectives.apart import require_apart

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
    """The trials under way. Tensors of losses hold one a trial, in the adapters' order."""

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
        lost = self._without({key: loss for key, (loss, _, _) in taken.items()}, "the loss")
        held_out: dict[str, float] = {}
        if self._due() and self.adapters.trials and self.job.data.eval is not None:
            held_out = dict(zip(self._keys(), self._held_out(self.job.data.eval), strict=True))
            lost |= self._without(held_out, "the held-out loss")
        if not (lost or held_out or self.done % self.job.report_every == 0 or self.done == self.plan.steps):
            return
        reports = {key: self._report(taken[key], held_out.get(key), step_s) for key in self._keys()}
        goes_on = report(reports, lost)
        self._keep(lambda key: goes_on[key])

    def _keys(self) -> list[str]:
        return [trial.key for trial in self.adapters.trials]

    def _keep(self, stays: Callable[[str], bool]) -> None:
        kept = [trial for trial in self.adapters.trials if stays(trial.key)]
        if len(kept) < len(self.adapters.trials):
            self.adapters.keep(kept)

    def _without(self, losses: Mapping[str, float], what: str) -> dict[str, RunError]:
        """Let the trials leave whose loss is no number; why, by trial."""
        lost = {key: self._not_finite(what, loss) for key, loss in losses.items() if not math.isfinite(loss)}
        self._keep(lambda key: key not in lost)
        return lost

    def _not_finite(self, what: str, loss: float) -> RunError:
        return NonFiniteLoss(
            f"training {self.job.spec.name}, step {self.done} of {self.plan.steps}",
            f"{what} is {loss}",
            "a loss must be finite",
            "lower optim.lr or optim.max_grad_norm; look at the rows of that step",
        )

    def _due(self) -> bool:
        every = self.job.eval_every or self.job.spec.eval_every
        return self.done % every == 0 or self.done == self.plan.steps

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
    def _held_out(self, rows: Rows) -> list[float]:
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
