"""Infilling: the trainer of `sft` on rearranged documents; held-out middles are generated before and after."""

from collections.abc import Mapping

from graftwork.training.objectives import sft
from graftwork.training.objectives.answers import held_out_answers
from graftwork.training.objectives.setting import BuiltTrainer, TrainerContext
from graftwork.training.rows.answered import AnsweredRows
from graftwork.training.text_spec import FimSpec


def build(setting: TrainerContext) -> BuiltTrainer:
    """Next-token loss on documents with their middle moved to the end; held-out: loss, exact match, edit similarity."""
    training, data, tokenizer = sft.build(setting), setting.job.data, setting.tokenizer()
    objective = setting.job.spec.objective
    assert isinstance(objective, FimSpec)

    def evaluate() -> Mapping[str, float]:
        assert isinstance(data.eval, AnsweredRows), "what rows.fim gives for held-out documents"
        answers = held_out_answers(training.trainer, data.eval, tokenizer, data.pad_id, objective.eval_tokens)
        return {**training.evaluate(), **answers}

    return BuiltTrainer(training.trainer, evaluate, evaluate_first=True)
