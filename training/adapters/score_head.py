"""A head that gives an answer one number, on the base as it is loaded for any run: a reward model's form."""

import copy
from typing import Any

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from graftwork.errors import BaseModelError

_QUANTISED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")
"""Marks of a quantised model that PEFT and the trainer look for."""


class ScoreHead(torch.nn.Linear):
    """Hidden state -> reward, in its own fp32 whatever the base computes in."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., 1)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def add_reward_head(model: Any) -> Any:
    """transformers' sequence classifier of one label around the same layers; the language head is left behind.

    It gives the reward of the last token that the attention mask shows. transformers takes the last one that is not the
    padding token, and in ChatML that token ends the answer as well. Draws the head from torch's global generator.
    Raises BaseModelError for an architecture without a classifier.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)] if known else None
    if classifier is None or classifier.base_model_prefix != model.base_model_prefix:
        raise BaseModelError(
            f"objective.kind=reward on {type(model).__name__}",
            "transformers has no sequence classifier of this architecture",
            "a reward model is a sequence classifier of one label",
            "take another base, or a reward function (objective.kind=grpo)",
        )
    with torch.device("meta"):  # its layers are those of `model`
        scorer = _pooled_by_mask(classifier)(config)
    setattr(scorer, classifier.base_model_prefix, getattr(model, model.base_model_prefix))
    embedding = model.get_input_embeddings().weight
    scorer.score = ScoreHead(config.get_text_config().hidden_size, 1, bias=False, device=embedding.device)
    torch.nn.init.normal_(scorer.score.weight, std=0.02)
    for mark in _QUANTISED:
        if hasattr(model, mark):
            setattr(scorer, mark, getattr(model, mark))
    return scorer


def _pooled_by_mask(classifier: Any) -> Any:
    class RewardHeadModel(classifier):  # type: ignore[misc]  # transformers is untyped here
        """The classifier, its score taken where the attention mask ends."""

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            inputs_embeds: None = None,
            labels: None = None,
            output_attentions: None = None,
            output_hidden_states: None = None,
            return_dict: None = None,
            use_cache: bool = False,
        ) -> Any:
            """Rewards as `logits` (B, 1) of rows padded on the right. What PEFT hands on beside the rows is None."""
            hidden_BTH = self.base_model(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
            last_B = attention_mask.sum(dim=1) - 1
            rows_B = torch.arange(len(last_B), device=last_B.device)
            return SequenceClassifierOutputWithPast(logits=self.score(hidden_BTH[rows_B, last_B]))

    return RewardHeadModel
