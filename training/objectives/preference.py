"""Losses on the likelihoods of whole answers (CPO, ORPO, KTO): likelihoods, the trainer, the reference's figures.

Legend: N rows, S sequences of a row (2 of a pair: chosen, rejected), B = N x S sequences, T tokens. A batch has the
first sequences of all rows, then the second ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graftwork.training.objectives.rows import IGNORED

if TYPE_CHECKING:
    import torch

    from graftwork.storage.store import RunPaths
    from graftwork.training.objectives.protocol import Rows
    from graftwork.training.objectives.trainer import TrainerContext

Inputs = Mapping[str, "torch.Tensor"]
RowLosses = tuple["torch.Tensor", Mapping[str, "torch.Tensor"]]
"""Loss of each row (N), and figures of each row (N) by name; NaN where a figure does not apply to the row."""
RowLoss = Callable[[Any, "torch.Tensor", "torch.Tensor", Inputs], RowLosses]
"""(trainer, log probabilities of the answers (N, S), tokens of the answers (N, S), batch) -> losses and figures."""
REFERENCE_FILE = "reference.json"


def answer_trainer(
    setting: TrainerContext, loss: RowLoss, collate: Callable[[list[dict[str, int]]], Any], sides: int, nll: float = 0.0
) -> Any:
    """Build a trainer of the mean of `loss` over the rows of a step, plus `nll` times the mean of -log p of `labels`.

    Both means are over all passes and workers of the step, so neither micro-batch nor number of workers changes them.
    collate: a batch with `input_ids`, `attention_mask`, `completion_mask` and `labels`, all (B, T).
    """
    import torch
    from trl import SFTTrainer

    from graftwork.compat.hf import step_figures
    from graftwork.training.objectives.sft import trainer_on
    from graftwork.training.objectives.trainer import router_loss, without_history

    rows_per_step = setting.job.spec.optim.rows_per_step

    class AnswerTrainer(without_history(SFTTrainer)):  # type: ignore[misc]  # trl has no types
        """SFTTrainer under a loss on whole answers."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Share of this pass in the step's loss, times the number of processes: DDP averages gradients."""
            output, logps_BT = token_logps(model, inputs, router=self.aux_loss_enabled)
            mask_BT = inputs["completion_mask"][:, 1:]
            logps_NS = (logps_BT * mask_BT).sum(dim=1).view(sides, -1).T
            losses_N, figures = loss(self, logps_NS, mask_BT.sum(dim=1).view(sides, -1).T, inputs)
            labelled_BT = inputs["labels"][:, 1:] != IGNORED
            whole = num_items_in_batch is None  # outside of a step, as for a single batch
            rows, tokens = (len(losses_N), labelled_BT.sum()) if whole else (rows_per_step, num_items_in_batch)
            total = losses_N.sum() / rows
            if nll:
                summed = -(logps_BT * labelled_BT).sum()
                total = total + nll * summed / tokens
                figures = {**figures, "nll_loss": summed.detach()[None] / labelled_BT.sum()}
            processes = self.accelerator.num_processes
            total = total + router_loss(self, output, inputs["attention_mask"], whole=whole, processes=processes)
            for name, values_N in figures.items():
                seen_N = ~values_N.isnan()
                pair = torch.stack([values_N.nansum(), seen_N.sum().to(values_N.dtype)]).detach()
                value, count = self.accelerator.reduce(pair, reduction="sum").tolist()
                if count:
                    step_figures(self)[name].append(value / count)
            return total * (1 if whole else self.accelerator.num_processes)

    return trainer_on(setting, AnswerTrainer, collate)


def token_logps(model: Any, inputs: Inputs, *, router: bool = False) -> tuple[Any, torch.Tensor]:
    """Return the model's output, and log probabilities (B, T - 1) of the tokens of answers and labels; 0 elsewhere."""
    import torch

    ids_BT, labels_BT = inputs["input_ids"], inputs.get("labels")
    targets_BT = torch.full_like(ids_BT, IGNORED) if labels_BT is None else labels_BT
    output = model(
        input_ids=ids_BT,
        attention_mask=inputs["attention_mask"],
        labels=torch.where(inputs["completion_mask"] == 1, ids_BT, targets_BT),
        use_cache=False,
        fused_lm_head=True,
        **({"output_router_logits": True} if router else {}),
    )
    return output, output.log_probs[:, 1 - ids_BT.shape[1] :]  # a trained prefix puts positions before the row's own


def answer_logps(
    trainer: Any,
    rows: Rows,
    used_U: NDArray[np.int64],
    pad_id: int,
    micro: int,
    *,
    sides: int = 2,
    whole_first: bool = False,
) -> NDArray[np.float32]:
    """Log probabilities (N, S) of the answers of the used rows by the model as it is, the same on all ranks.

    whole_first: a further column has the log probability of the whole first sequence, prompt and answer.
    """
    import torch

    from graftwork.training.objectives.trainer import share

    accelerator = trainer.accelerator
    sums = torch.zeros((len(rows), sides + whole_first), device=accelerator.device)
    trainer.model.eval()
    with torch.no_grad():
        for places in share(rows.lengths_N[used_U], micro, accelerator.process_index, accelerator.num_processes):
            chosen = used_U[np.asarray(places)].tolist()
            inputs = {key: value.to(accelerator.device) for key, value in rows.collate(chosen, pad_id).items()}
            if whole_first:
                inputs["labels"] = first_side(inputs, sides, "attention_mask")
            with accelerator.autocast():
                logps_BT = token_logps(trainer.model, inputs)[1]
            answers = (logps_BT * inputs["completion_mask"][:, 1:]).sum(dim=1).float().view(sides, -1)
            whole = logps_BT[: len(chosen)].sum(dim=1).float()[None] if whole_first else answers[:0]
            sums[chosen] = torch.cat([answers, whole]).T
    trainer.model.train()
    found: NDArray[np.float32] = accelerator.reduce(sums, reduction="sum").cpu().numpy()
    return found


def first_side(inputs: Inputs, sides: int, mask: str) -> torch.Tensor:
    """Labels (B, T): the ids of each row's first sequence where `mask` of the batch is 1."""
    labels_BT = inputs["input_ids"].masked_fill(inputs[mask] == 0, IGNORED)
    labels_BT[len(labels_BT) // sides :] = IGNORED
    return labels_BT


def reference_logps(
    setting: TrainerContext, name: str, trainer: Any, rows: Rows, used_U: NDArray[np.int64], *, sides: int = 2
) -> NDArray[np.float32]:
    """The reference's log probabilities (N, S) of the answers: computed, or those of the run that goes on.

    The reference is the model as it is when its trainer is built. A fresh adapter is left out: it changes nothing yet.
    """
    from peft import PeftModel

    run, key = setting.job.run, f"{name}-{REFERENCE_FILE}"
    known = _read_reference(run, key, trainer)
    if known is not None:
        return known
    base_alone = setting.job.spec.init_from is None and isinstance(trainer.model, PeftModel)
    with trainer.model.disable_adapter() if base_alone else contextlib.nullcontext():
        micro = setting.job.spec.optim.rows_per_pass
        found = answer_logps(trainer, rows, used_U, setting.job.data.pad_id, micro, sides=sides)
    if run is not None and trainer.accelerator.process_index == 0:
        run.store.write_json(found.tolist(), *run.file(key))
    return found


def _read_reference(run: RunPaths | None, key: str, trainer: Any) -> NDArray[np.float32] | None:
    """Likelihoods of an earlier attempt of this run; rank 0 looks, so that all ranks do alike."""
    import torch

    there = run is not None and trainer.accelerator.process_index == 0 and run.store.exists(*run.file(key))
    seen = trainer.accelerator.reduce(torch.tensor([float(there)], device=trainer.accelerator.device), reduction="sum")
    if run is None or not seen.item():
        return None
    return np.array(run.store.read_json(*run.file(key)), dtype=np.float32)
