"""Odds ratio preference optimisation (arXiv 2403.07691): supervised finetuning and pairs in one loss, no reference.

The loss is that of TRL 1.16's ORPOTrainer, whose cross-entropy is over the prompts' tokens too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from graftwork.config import Spec
from graftwork.training.objectives.cpo import pair_trainer
from graftwork.training.objectives.dpo import read_pairs
from graftwork.training.objectives.protocol import Part, Traits, check_pairs

if TYPE_CHECKING:
    import torch

    from graftwork.prompts.template import Template
    from graftwork.training.objectives.rows import ReadPart
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec


class OrpoSpec(Spec):
    """Odds ratio preference optimisation on `chosen` and `rejected` answers."""

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio, lambda in the paper, next to the cross-entropy of prompt and chosen answer."""

    @property
    def traits(self) -> Traits:
        return Traits(sequences=2, head="fused", conversations=False)

    def check(self, run: TrainSpec) -> None:
        check_pairs(run, self.kind)

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """Read the pairs of which both conversations fit. Raises DataError, StorageError."""
        return read_pairs(spec, template, part)

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Build the trainer of the cross-entropy and of the odds ratio."""
        return pair_trainer(setting, self, nll=1.0, on_prompt=True)

    def losses(self, logps_N2: torch.Tensor, lengths_N2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each pair (N) and the rewards of both answers (N, 2), of mean log probabilities."""
        import torch

        means_N2 = logps_N2 / lengths_N2
        chosen_N, rejected_N = log_odds(means_N2).unbind(1)
        return -self.beta * torch.nn.functional.logsigmoid(chosen_N - rejected_N), self.beta * means_N2


NEAREST = -1e-8
"""Largest log p that has odds in fp32: of p = 1 they are infinite."""


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of probabilities p, given as log p.

    One form for all p: of two under a `where`, as in TRL 1.16, the one that is not taken has an infinite gradient where
    p rounds to 1, and the weights become NaN.
    """
    import torch

    logps = logps.clamp(max=NEAREST)
    return logps - torch.log(-torch.expm1(logps))
