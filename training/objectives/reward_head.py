"""Reward head on a base, and the rewards that a published reward model gives to whole conversations."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from graftwork.artifacts.publish import fetch
from graftwork.base.load import ResolvedBase, load, template
from graftwork.errors import BaseModelError
from graftwork.quantization import QuantSpec
from graftwork.storage.store import Store
from graftwork.training.objectives.rows import TokenRows
from graftwork.training.objectives.trainer import share
from graftwork.training.rewards import scoring_adapter

SCORED_AT_ONCE = 8
Scorer = Callable[[list[list[int]]], list[float]]
"""Token ids of conversations that end with an answer -> their rewards."""
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
        scorer = _reward_head_class(classifier)(config)
    setattr(scorer, classifier.base_model_prefix, getattr(model, model.base_model_prefix))
    embedding = model.get_input_embeddings().weight
    scorer.score = ScoreHead(config.get_text_config().hidden_size, 1, bias=False, device=embedding.device)
    torch.nn.init.normal_(scorer.score.weight, std=0.02)
    for mark in _QUANTISED:
        if hasattr(model, mark):
            setattr(scorer, mark, getattr(model, mark))
    return scorer


def _reward_head_class(classifier: Any) -> Any:
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
            """Rewards as `logits` (B, 1) of rows padded on the right. PEFT's other arguments are None."""
            hidden_BTH = self.base_model(input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
            last_B = attention_mask.sum(dim=1) - 1
            rows_B = torch.arange(len(last_B), device=last_B.device)
            return SequenceClassifierOutputWithPast(logits=self.score(hidden_BTH[rows_B, last_B]))

    return RewardHeadModel


@torch.no_grad()
def rewards_of(model: Any, rows: TokenRows, indices: Sequence[int], pad_id: int) -> torch.Tensor:
    """Rewards (B) of these rows by the model as it is."""
    inputs, device = rows.collate(indices, pad_id), next(model.parameters()).device
    masked = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}
    scores: torch.Tensor = model(**masked).logits[:, 0].float()
    return scores


def load_scorer(root: str, ref: str, base: ResolvedBase, quant: QuantSpec, device: str = "cpu") -> Scorer:
    """A published reward model (`task@alias`), on a base of its own in this process.

    Raises ArtifactError: no such adapter, one of another base, one that is no reward model.
    """
    store = Store(root)
    manifest = scoring_adapter(store, ref, base)
    loaded = load(base, quant, device=device, purpose="train")
    model = PeftModel.from_pretrained(add_reward_head(loaded.model), fetch(store, manifest.task, manifest.version))
    model.eval()
    pad_id = template(base).pad_id

    def score(conversations: list[list[int]]) -> list[float]:
        rows = TokenRows.from_pairs([(ids, [False] * len(ids)) for ids in conversations])
        rewards = np.zeros(len(rows))
        with torch.autocast(device.partition(":")[0], dtype=loaded.dtype, enabled=device != "cpu"):
            for places in share(rows.lengths_N, SCORED_AT_ONCE, 0, 1):
                rewards[list(places)] = rewards_of(model, rows, places, pad_id).cpu().numpy()
        return [float(reward) for reward in rewards]

    return score
