"""The objective of docs/extending.md: its spec and rule, a training run, and its loss against torch's own."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.objectives.trainer import trained_logits
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests.docs.extending.common import require_copy
from tests.training import task


def main(work: Path) -> None:
    require_copy(work)
    spec = task(work, objective={"kind": "smoothed", "epsilon": 0.2}, num_workers=1)
    assert spec.objective.model_dump() == {"kind": "smoothed", "epsilon": 0.2}
    with pytest.raises((ConfigError, ValueError), match="zero3"):
        TrainSpec.model_validate({**spec.model_dump(mode="json"), "strategy": {"kind": "zero3"}})
    data = prepare(spec)
    result = run_steps(TrainJob(spec, data), lambda _: True)
    losses = [loss for _, loss in result.train_loss]
    assert losses[-1] < losses[0], losses
    assert result.eval_loss, "held-out rows are scored"
    check_loss(data.train.collate([0, 1, 2], data.pad_id))


def check_loss(inputs: dict[str, torch.Tensor]) -> None:
    """Compare the trainer's loss with (1 - e) nll + e mean over the vocabulary, computed apart (arXiv 1512.00567)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    trainer_class = importlib.import_module("graftwork.training.objectives.smoothed").smoothed_trainer(0.2)
    trainer = trainer_class.__new__(trainer_class)
    trainer.model = model
    logits, targets = trained_logits(model, model.get_output_embeddings(), inputs)
    logps = logits.log_softmax(dim=-1)
    nll = -logps.gather(1, targets[:, None]).squeeze(1)
    expected = (0.8 * nll - 0.2 * logps.mean(dim=-1)).mean()
    torch.testing.assert_close(trainer.compute_loss(model, inputs), expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
