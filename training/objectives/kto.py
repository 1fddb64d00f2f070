"""Kahneman-Tversky optimisation (arXiv 2402.01306): answers with a label, good or bad, and a reference.

The losses are those of TRL 1.16's KTOTrainer. TRL estimates the distance to the reference (KL) in each forward pass,
from its rows: each prompt with the answer of the row before. Here the estimate is over all rows of the step, the
same on every worker, so that neither micro-batch nor number of workers changes a step. With one pass a step both are
equal.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from graftwork.config import Spec, canonical_json
from graftwork.datasets.examples import iter_examples
from graftwork.datasets.keys import KeyCheck
from graftwork.errors import DataError
from graftwork.training.objectives.dpo import answered
from graftwork.training.objectives.preference import Inputs, RowLosses, answer_logps, answer_trainer, reference_logps
from graftwork.training.objectives.protocol import Part, Traits, check_pairs, nothing_left, too_long
from graftwork.training.objectives.rows import IGNORED, ReadPart, TokenRows, data_of, read_prompt

if TYPE_CHECKING:
    import torch

    from graftwork.prompts.template import Template
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec


class KtoSpec(Spec):
    """Kahneman-Tversky optimisation on answers with `label` true (desirable) or false (undesirable)."""

    kind: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference: what training began from, the base or `init_from`."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """apo_zero_unpaired: APO-zero of single answers (arXiv 2408.06266), without an estimate of the KL."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Factor of the losses of answers with label true."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Factor of the losses of answers with label false."""

    @model_validator(mode="after")
    def _weights_differ(self) -> Self:
        if self.desirable_weight == self.undesirable_weight != 1:
            raise ValueError(
                f"desirable_weight={self.desirable_weight:g} equals undesirable_weight: both together are a factor of "
                "the learning rate. Leave one of them at 1"
            )
        return self

    @property
    def traits(self) -> Traits:
        mismatched = int(self.loss_type == "kto")  # answers of other rows, for the KL
        before = 1 + mismatched
        return Traits(head="fused", conversations=False, scored_per_step=mismatched, scored_before=before)

    def check(self, run: TrainSpec) -> None:
        check_pairs(run, self.kind)
        if self.loss_type == "kto" and run.data.thinking == "mask":
            raise ValueError(
                "data.thinking=mask can't be combined with objective.loss_type=kto: a row's reasoning would be part "
                "of the prompt of a mismatched answer. Set data.thinking=keep or drop"
            )
        if self.loss_type == "kto" and run.optim.rows_per_step < 2:
            raise ValueError(
                "optim.rows_per_step=1 can't go with objective.loss_type=kto: the KL is estimated from prompts of a "
                "step with answers of its other rows. Set optim.rows_per_step=8"
            )

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """Read the answers of which prompt and answer fit. Raises DataError, StorageError."""
        return read_labelled(spec, template, part, self)

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Build the trainer of the labelled answers; the reference is the model as it is now."""
        from graftwork.training.objectives.trainer import BuiltTrainer

        run, plan, micro_batch = setting.job.data, setting.plan, setting.job.spec.optim.rows_per_pass
        train, held_out_rows = run.train, run.eval
        assert isinstance(train, LabelledRows), "`read` returned them"
        state = _State(self, train, plan.rows_SR, setting.job.spec.max_length, micro_batch, run.pad_id)

        def collate(batch: list[dict[str, int]]) -> Inputs:
            return state.collate([item["row"] for item in batch])

        trainer = answer_trainer(setting, state.loss, collate, 1)
        used_U = np.unique(plan.rows_SR)
        state.reference_N = reference_logps(setting, "train", trainer, train, used_U, sides=1)[:, 0]
        if self.loss_type == "kto":
            mixed = state.mixed
            state.mixed_reference_P = reference_logps(
                setting, "train-kl", trainer, mixed, np.arange(len(mixed)), sides=1
            )[:, 0]
        if held_out_rows is None:
            return BuiltTrainer(trainer, dict, (state.note(),))
        assert isinstance(held_out_rows, LabelledRows), "`read` returned them"
        rows = held_out_rows
        every_N = np.arange(len(rows))[None]
        held = _State(self, rows, every_N, setting.job.spec.max_length, micro_batch, run.pad_id)
        held.reference_N = reference_logps(setting, "eval", trainer, rows, every_N[0], sides=1)[:, 0]
        if self.loss_type == "kto":
            held.mixed_reference_P = reference_logps(setting, "eval-kl", trainer, held.mixed, every_N[0], sides=1)[:, 0]
        return BuiltTrainer(trainer, lambda: held.figures(trainer), (state.note(),))

    def losses(self, ratios_N: torch.Tensor, labels_N: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        """Return the loss of each answer from its log ratio of policy to reference. kl: the estimate, at least 0."""
        import torch

        sign_N = torch.where(labels_N, 1.0, -1.0).to(ratios_N)
        weights_N = torch.where(labels_N, self.desirable_weight, self.undesirable_weight).to(ratios_N)
        if self.loss_type == "apo_zero_unpaired":
            losses_N = torch.where(labels_N, 1.0, 0.0).to(ratios_N) - sign_N * torch.sigmoid(self.beta * ratios_N)
        else:
            losses_N = 1 - torch.sigmoid(self.beta * sign_N * (ratios_N - kl))
        return weights_N * losses_N


@dataclass(frozen=True)
class LabelledRows:
    """Answers to prompts, each with its label."""

    answers: TokenRows
    labels_N: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.answers)

    @functools.cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of prompt and answer."""
        return self.answers.lengths_N

    @functools.cached_property
    def scored_N(self) -> NDArray[np.int64]:
        """Tokens of the answer."""
        return self.answers.scored_N

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """A row is one sequence."""
        return self.answers.widths_N

    def digest(self) -> str:
        """sha256 hex over answers and labels."""
        return hashlib.sha256(self.answers.digest().encode() + self.labels_N.tobytes()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
        """Ids, attention mask, completion mask and labels of the loss (B, T)."""
        inputs = self.answers.collate(indices, pad_id)
        return {**inputs, "completion_mask": (inputs["labels"] != IGNORED).long()}


@dataclass(frozen=True)
class MixedRows:
    """Prompts with answers of other rows, cut to `max_length` tokens. P pairs: row of the prompt, row of the answer."""

    rows: LabelledRows
    pairs_P2: NDArray[np.int64]
    max_length: int

    def __len__(self) -> int:
        return len(self.pairs_P2)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of prompt and answer."""
        starts_N = self.rows.lengths_N - self.rows.scored_N
        whole_P = starts_N[self.pairs_P2[:, 0]] + self.rows.scored_N[self.pairs_P2[:, 1]]
        return np.asarray(np.minimum(whole_P, self.max_length), dtype=np.int64)

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Tokens of the answer."""
        return self.lengths_N - (self.rows.lengths_N - self.rows.scored_N)[self.pairs_P2[:, 0]]

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """A pair is one sequence."""
        return self.lengths_N

    def digest(self) -> str:
        """sha256 hex over rows and pairs."""
        return hashlib.sha256(self.rows.digest().encode() + self.pairs_P2.tobytes()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
        """As `LabelledRows.collate`."""
        made = []
        for prompt, answer in self.pairs_P2[list(indices)]:
            ids, scored = self.rows.answers.row(int(prompt))
            other_ids, other_scored = self.rows.answers.row(int(answer))
            whole = [*ids[~scored].tolist(), *other_ids[other_scored].tolist()][: self.max_length]
            start = int((~scored).sum())
            made.append((whole, [False] * start + [True] * (len(whole) - start)))
        return LabelledRows(TokenRows.from_pairs(made), np.zeros(len(made), dtype=np.bool_)).collate(
            range(len(made)), pad_id
        )


class _State:
    """Rows of a run with their reference, and the KL of the present step."""

    def __init__(
        self, spec: KtoSpec, rows: LabelledRows, rows_SR: NDArray[np.int64], max_length: int, micro: int, pad_id: int
    ) -> None:
        self.spec, self.rows, self.micro, self.pad_id, self.steps = spec, rows, micro, pad_id, len(rows_SR)
        pairs_SR2 = mismatched(rows_SR, rows.lengths_N)
        pairs_P2, places = np.unique(pairs_SR2.reshape(-1, 2), axis=0, return_inverse=True)
        self.mixed = MixedRows(rows, pairs_P2, max_length)
        self.places_SR = places.reshape(rows_SR.shape)
        self.reference_N = self.mixed_reference_P = np.zeros(0, dtype=np.float32)
        self._kl: tuple[int, torch.Tensor] | None = None

    def note(self) -> str:
        """Return the note for the run's report."""
        scored = len(self.mixed) if self.spec.loss_type == "kto" else 0
        return f"reference: {np.count_nonzero(self.reference_N)} answers and {scored} mismatched ones scored once"

    def collate(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch with labels and the reference's likelihoods."""
        import torch

        extra = {"label": torch.from_numpy(self.rows.labels_N[list(rows)])}
        return {
            **self.rows.collate(rows, self.pad_id),
            **extra,
            "ref_logps": torch.from_numpy(self.reference_N[list(rows)]),
        }

    def kl(self, trainer: Any, step: int) -> torch.Tensor:
        """Return the KL of a step, at least 0: the mean log ratio of its mismatched answers. Collective at first."""
        import torch

        if self.spec.loss_type != "kto":
            return torch.zeros((), device=trainer.accelerator.device)
        places_R = self.places_SR[step]
        used_U, counts_U = np.unique(places_R, return_counts=True)
        used = replace(self.mixed, pairs_P2=self.mixed.pairs_P2[used_U])
        logps_U = answer_logps(trainer, used, np.arange(len(used)), self.pad_id, self.micro, sides=1)[:, 0]
        ratios_U = (logps_U - self.mixed_reference_P[used_U]).astype(np.float64)
        mean = float((ratios_U * counts_U).sum() / len(places_R))
        return torch.tensor(max(mean, 0.0), dtype=torch.float32, device=trainer.accelerator.device)

    def loss(self, trainer: Any, logps_N1: torch.Tensor, lengths_N1: torch.Tensor, inputs: Inputs) -> RowLosses:
        """Return losses and figures of one forward pass; the first of a step estimates the KL."""
        import torch

        step = int(trainer.state.global_step)
        if self._kl is None or self._kl[0] != step:
            self._kl = step, self.kl(trainer, step)
        ratios_N, good_N = logps_N1[:, 0] - inputs["ref_logps"], inputs["label"]
        rewards_N, nan = self.spec.beta * ratios_N.detach(), torch.nan
        return self.spec.losses(ratios_N, good_N, self._kl[1]), {
            "kl": self._kl[1].expand(len(ratios_N)),
            "rewards/chosen": rewards_N.masked_fill(~good_N, nan),
            "rewards/rejected": rewards_N.masked_fill(good_N, nan),
        }

    def figures(self, trainer: Any) -> Mapping[str, float]:
        """Loss, KL and mean rewards over all rows; label_accuracy: the share whose reward has the sign of its label."""
        import torch

        every_N = np.arange(len(self.rows))
        logps_N = answer_logps(trainer, self.rows, every_N, self.pad_id, self.micro, sides=1)[:, 0]
        ratios_N = torch.from_numpy(logps_N - self.reference_N).double()
        good_N, kl = torch.from_numpy(self.rows.labels_N), self.kl(trainer, 0).cpu().double()
        rewards_N = self.spec.beta * ratios_N
        sides = {"rewards/chosen": rewards_N[good_N], "rewards/rejected": rewards_N[~good_N]}
        return {
            "loss": self.spec.losses(ratios_N, good_N, kl).mean().item(),
            "kl": kl.item(),
            "label_accuracy": ((rewards_N > 0) == good_N).double().mean().item(),
            **{name: values.mean().item() for name, values in sides.items() if len(values)},
        }


def mismatched(rows_SR: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """(row of the prompt, row of the answer) (S, R, 2): each prompt with the answer before, by length and number.

    The order in which rows are dealt to workers has no influence.
    """
    order_SR = np.lexsort((rows_SR, lengths_N[rows_SR]), axis=1)
    sorted_SR = np.take_along_axis(rows_SR, order_SR, axis=1)
    return np.stack([sorted_SR, np.roll(sorted_SR, 1, axis=1)], axis=2)


def read_labelled(spec: TrainSpec, template: Template, part: Part, objective: KtoSpec) -> ReadPart:
    """The labelled answers of which prompt and answer fit. Raises DataError, StorageError."""
    source, limit = data_of(spec, part)
    prompt, shots = read_prompt(spec, part)
    keys, contents, raw = KeyCheck(), array("q"), hashlib.sha256()
    kept, labels, numbers, dropped = [], [], [], 0
    for number, row in enumerate(iter_examples(source, "unpaired", limit=limit, keys=keys), start=1):
        assert row.label is not None, "an example that was read with its label"
        contents.append(row.content_hash())
        raw.update(canonical_json([row.id, row.content_hash()]).encode() + b"\n")
        if row.messages[-1].thinking == "mask":
            raise DataError(
                f"{row.where}: thinking_mode",
                "found 'mask'",
                "an answer of kto is learned whole: its reasoning would be part of the prompt of a mismatched answer",
                "set keep or drop",
            )
        asked = replace(row, messages=row.messages[:-1])
        found = answered(asked, row.messages[-1], template, prompt, spec.data.thinking)
        if len(found[0]) <= spec.max_length:
            kept.append(found)
            labels.append(row.label)
            numbers.append(number)
            continue
        dropped += 1
        if spec.on_overlong == "refuse":
            raise too_long(spec, part, number, row.id, len(found[0]))
    if not kept:
        raise nothing_left(spec, part, dropped)
    rows = LabelledRows(TokenRows.from_pairs(kept), np.array(labels, dtype=np.bool_))
    warnings = (*keys.note(f"data.{part}"), *shots, *(balance(rows, objective) if part == "train" else ()))
    return ReadPart(rows, dropped, raw.hexdigest(), (), (), warnings, contents, keys, tuple(numbers))


def balance(rows: LabelledRows, objective: KtoSpec) -> tuple[str, ...]:
    """Warning where the weighted labels are further apart than the paper's equation 8 allows: 1 to 4/3."""
    good, bad = int(rows.labels_N.sum()), int((~rows.labels_N).sum())
    if not good or not bad:
        label = str(bool(good)).lower()
        return (f"data.train: label is {label} in all {len(rows)} rows, so nothing tells good answers from bad ones",)
    share = good * objective.desirable_weight / (bad * objective.undesirable_weight)
    if 3 / 4 <= share <= 4 / 3:
        return ()
    weight = bad * objective.undesirable_weight / good
    return (
        f"data.train: {good} rows with label true and {bad} with false: set objective.desirable_weight={weight:.3g} "
        f"or objective.undesirable_weight={good * objective.desirable_weight / bad:.3g} (arXiv 2402.01306, equation 8)",
    )
