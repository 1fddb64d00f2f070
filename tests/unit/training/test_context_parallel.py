"""Context parallelism on gloo ranks: the losses, weights and held-out figures of one process."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftwork.base import load as base_model
from graftwork.base.support import check_training
from graftwork.errors import BaseModelError, ConfigError
from graftwork.training.context_parallel import ContextParallelRows
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import IGNORED, TokenRows, prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests.ranks import Task, train_on
from tests.unit.training.objectives.test_training_text import TEXTS, text_task


def spec_of(folder: Path, **changes: Any) -> TrainSpec:
    for name, texts in (("text", TEXTS), ("held", TEXTS[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    usual = {
        "objective": {"kind": "cpt", "packing": "none"},
        "num_workers": 2,
        "strategy.context_parallel": 2,
        "optim.micro_batch": 2,
    }
    return text_task(folder, **{**usual, **changes})


def test_parts_of_a_batch_are_its_tokens_and_score_each_target_once() -> None:
    rng = np.random.default_rng(1)
    rows = TokenRows.from_pairs(
        [(rng.integers(3, 90, n).tolist(), (rng.random(n) < 0.6).tolist()) for n in (7, 12, 1, 13)]
    )
    batch, size = rows.collate([0, 1, 2, 3], pad_id=2), 3
    parts = [ContextParallelRows(rows, rank, size).collate([0, 1, 2, 3], 2) for rank in range(size)]
    assert len({part["input_ids"].shape for part in parts}) == 1
    ids = torch.cat([part["input_ids"] for part in parts], dim=1)
    assert torch.equal(ids[:, :13], batch["input_ids"])
    assert (ids[:, 13:] == 2).all()
    assert torch.cat([part["position_ids"] for part in parts], dim=1)[0].tolist() == list(range(15))
    targets = torch.cat([part["labels"][:, 1:] for part in parts], dim=1)
    assert torch.equal(targets[:, :12], batch["labels"][:, 1:])
    assert (targets[:, 12:] == IGNORED).all()
    assert all((part["labels"][:, 0] == IGNORED).all() for part in parts), "a target is counted once"


@pytest.mark.long
def test_two_and_four_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Gloo. Rows of other lengths than a multiple of the workers, padding, accumulation, an fp32 LoRA."""
    alone_spec = spec_of(tmp_path, **{"num_workers": 1, "strategy.context_parallel": 1})
    alone = run_steps(TrainJob(alone_spec, prepare(alone_spec)), lambda _: True)
    for world, kinds in ((2, ("ddp", "fsdp2")), (4, ("ddp",))):
        specs = {kind: spec_of(tmp_path, **{"strategy.kind": kind, "num_workers": world}) for kind in kinds}
        tasks = {kind: Task(TrainJob(spec, prepare(spec))) for kind, spec in specs.items()}
        for kind, end in train_on(world, tasks, tmp_path / f"ranks-{world}").items():
            assert end.losses == pytest.approx([loss for _, loss in alone.train_loss], rel=2e-6), (world, kind)
            held_out = [loss for _, loss in end.result.eval_loss]
            assert held_out == pytest.approx([loss for _, loss in alone.eval_loss], rel=2e-6), (world, kind)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"num_workers": 3, "optim.rows_per_step": 6},
            "num_workers=3 must be a multiple of strategy.context_parallel=2",
        ),
        ({"strategy.kind": "zero2"}, "can't go with strategy.kind=zero2"),
        ({"objective.packing": "best_fit"}, "documents of a row would see each other"),
        ({"objective": {"kind": "fim"}}, "the loss must be a sum over tokens"),
        ({"num_workers": 4, "optim.rows_per_step": 3}, "rows_per_step=3 must be a multiple"),
        ({"num_workers": 4, "recovery.min_workers": 3}, "recovery.min_workers=3 must be a multiple"),
    ],
)
def test_what_parts_of_rows_cannot_compute_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(found)):
        spec_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "config", "found"),
    [
        ({"strategy.context_parallel": 2, "num_workers": 2}, {"num_attention_heads": 9}, "9 attention heads"),
        ({"max_length": 512}, {"sliding_window": 256}, "sliding window of 256 tokens"),
        ({}, {"attn_logit_softcapping": 50.0}, "soft-capping or sinks"),
    ],
)
def test_a_base_whose_attention_has_no_parts_is_refused_before_a_worker_starts(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, Any], found: str
) -> None:
    spec = spec_of(tmp_path, **changes)
    known = json.loads((base_model.resolve(spec.base).folder / "config.json").read_text())
    check_training(spec, known)
    with pytest.raises(BaseModelError, match=found):
        check_training(spec, {**known, "hidden_size": 36, "head_dim": 4, "num_key_value_heads": 1, **config})
