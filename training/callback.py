"""Callback of transformers' Trainer: report each step, evaluate, write checkpoints, stop, scale the learning rate."""

import ctypes
import math
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, set_seed

from graftwork.training.checkpoint import AsyncCheckpointSaver, CheckpointMark, Checkpoints
from graftwork.training.checkpoint_resume import ResumePoint, split_optimizer_groups
from graftwork.training.loop import StepPlan
from graftwork.training.lr_schedule import scale
from graftwork.training.worker_messages import (
    NonFiniteLoss,
    Report,
    StepLog,
    StepReport,
    TrainJob,
    all_gather_object,
)

if TYPE_CHECKING:
    from graftwork.training.objectives.trainer import BuiltTrainer

SHARED = frozenset({"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "tokens"})
"""Figures of every trainer that a step's report has fields for, or that no reader needs."""


class StepCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Runs on every rank; rank 0 alone reports and writes. All ranks decide alike, as collectives need it."""

    training: "BuiltTrainer"

    def __init__(
        self,
        job: TrainJob,
        plan: StepPlan,
        log: StepLog,
        report: Report,
        preemption_requested: Callable[[], bool],
        start: ResumePoint,
        saver: AsyncCheckpointSaver | None,
    ) -> None:
        self.job, self.plan, self.log, self.report = job, plan, log, report
        self.preemption_requested, self.start, self.saver = preemption_requested, start, saver
        self.stopped = self.preempted = False
        self._tokens = plan.tokens_S.cumsum()
        self._figures: Mapping[str, float] = {}
        self._started: float | None = None
        self._step_started = 0.0
        self._before: Mapping[str, float] = {}

    def elapsed_s(self) -> float:
        """Seconds of training so far, earlier attempts included."""
        return self.start.mark.elapsed_s + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw new random states where another number of workers left them; evaluate what training is compared with."""
        mark, spec = self.start.mark, self.job.spec
        if mark.world_size != args.world_size:
            set_seed(zlib.crc32(repr((spec.seed, mark.step, args.process_index)).encode()))
        if self.start.universal and self.start.folder is not None:
            split_optimizer_groups(self.training.trainer.model_wrapped)
            all_gather_object(None)  # every rank has loaded it
            if self.start.sends:
                shutil.rmtree(self.start.folder, ignore_errors=True)
        if spec.optim.factors:
            scale(kwargs["optimizer"], kwargs["lr_scheduler"], spec.optim.factors, self.plan.steps)
        if self.training.evaluate_first and state.global_step == 0 and self.job.data.eval is not None:
            self._before = self.training.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        self._step_started = time.perf_counter()
        self._started = self._started or self._step_started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the activations' memory back to the system after each pass that computed on a CPU.

        glibc would keep it in pieces that passes of other shapes do not always fit into: over 12 steps on rows of 117
        to 173 tokens workers of SmolLM2-135M peaked at 2.05 to 2.66 GiB, and at 2.03 to 2.04 with this. It takes 0.16 s
        of a step of 5 s.
        """
        if not self.job.spec.gpus and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)

    on_substep_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """A step is done on all ranks, `logs` holds its figures, and nothing is saved yet."""
        if "loss" not in logs:
            return  # the trainer's summary at its end
        job, step_s, step = self.job, time.perf_counter() - self._step_started, int(state.global_step)
        if not math.isfinite(logs["loss"]):
            raise self._non_finite_error(step, logs["loss"])
        last, evaluated = step == self.plan.steps, dict[str, float]()
        if job.data.eval is not None and (last or step % (job.eval_every or job.spec.eval_every) == 0):
            evaluated = {f"eval_{key}": value for key, value in self.training.evaluate().items()}
        own = {key: float(value) for key, value in logs.items() if key not in SHARED}
        if step == 1:
            own |= {f"before_{key}": value for key, value in self._before.items()}
        report = StepReport(
            step=step,
            total_steps=self.plan.steps,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens=int(logs.get("tokens", self._tokens[step - 1])),  # sampled answers are as long as they are
            eval_loss=evaluated.get("eval_loss"),
            elapsed_s=self.elapsed_s(),
            step_s=step_s,
            metrics=own | {key: value for key, value in evaluated.items() if key != "eval_loss"},
        )
        self._figures = {"loss": report.loss, **evaluated, **report.metrics}
        goes_on, self.preempted = self._broadcast_answer(report)
        if not goes_on or self.preempted:
            self.stopped = not last
            control.should_training_stop = True
        due = step % job.spec.checkpoint_every == 0 or last or self.stopped
        control.should_save = self.saver is not None and due

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has written its files on every rank; make them one complete checkpoint."""
        assert self.saver is not None, "only runs save"
        all_gather_object(None)  # every rank has written
        mark = CheckpointMark(
            step=int(state.global_step),
            elapsed_s=self.elapsed_s(),
            world_size=args.world_size,
            strategy=self.job.spec.strategy.kind,
            metrics=self._figures,
        )
        self.saver.save(mark)

    def _broadcast_answer(self, figures: StepReport) -> tuple[bool, bool]:
        """(rank 0's `report` lets training go on, a machine is about to be taken away), the same on all ranks."""
        args = self.training.trainer.args
        due = (
            figures.step % self.job.report_every == 0
            or figures.eval_loss is not None
            or figures.step == figures.total_steps
        )
        stop = False
        if args.process_index == 0:
            self.log.add(figures)
            stop = due and not self.report(figures)
        said = torch.tensor([float(stop), float(self.preemption_requested())], device=args.device)
        if args.world_size > 1 and due:
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        elif args.world_size > 1:
            said[1] = 0.0  # asked again when all meet
        return not bool(said[0]), bool(said[1])

    def _non_finite_error(self, step: int, loss: float) -> NonFiniteLoss:
        if self.saver:
            self.saver.wait()
        mark = Checkpoints(self.job.run).newest() if self.job.run else None
        good = f"checkpoint of step {mark.step} is the last good one" if mark else "no checkpoint was made before it"
        return NonFiniteLoss(
            f"training {self.job.spec.name}, step {step} of {self.plan.steps}",
            f"the loss is {loss}; {good}",
            "a loss must be finite",
            f"lower optim.lr (now {self.job.spec.optim.lr:g}) or optim.max_grad_norm; look at the rows of that step",
        )
