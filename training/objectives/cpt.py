"""Continued pretraining: the trainer of `sft` on documents; held-out text is measured before the first step too."""

import math
from collections.abc import Mapping

from graftwork.training.objectives import sft
from graftwork.training.objectives.setting import BuiltTrainer, TrainerContext


def build(setting: TrainerContext) -> BuiltTrainer:
    """Next-token loss over all tokens but the first of each document, and the perplexity of held-out text."""
    training = sft.build(setting)

    def evaluate() -> Mapping[str, float]:
        figures = training.evaluate()
        return {**figures, "perplexity": math.exp(figures["loss"])}

    return BuiltTrainer(training.trainer, evaluate, evaluate_first=True)
