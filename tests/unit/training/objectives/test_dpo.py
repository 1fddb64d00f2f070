"""Preference learning: rows, the loss against plain torch and TRL's own trainer, the reference, what is learned."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, TrainerCallback

from graftwork.base import load as base_model
from graftwork.errors import ConfigError, DataError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.loop import plan_of, run_steps
from graftwork.training.objectives import dpo
from graftwork.training.objectives.dpo import DpoSpec, PairRows
from graftwork.training.objectives.rows import prepare
from graftwork.training.objectives.trainer import TrainerContext, build
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport, TrainJob
from tests.training import pair_task

LOSSES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "robust", "label_smoothing": 0.2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preference")


def setting_of(spec: TrainSpec, folder: Path) -> TrainerContext:
    job = TrainJob(spec, prepare(spec))
    base = base_model.resolve(spec.base)
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    torch.manual_seed(spec.seed)
    return TrainerContext(
        job, plan_of(job, 1), base, attach(loaded.model, spec.adapter), folder / "out", TrainerCallback()
    )


def shake(model: Any) -> None:
    """Move the adapter away from zero, so that policy and reference differ."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def answer_logps_by_hand(model: Any, rows: PairRows, indices: list[int]) -> torch.Tensor:
    """(N, 2) sums of log-probabilities of the answers' tokens, one sequence at a time, in plain torch."""
    found = []
    for side in (rows.chosen, rows.rejected):
        for index in indices:
            ids, scored = (torch.from_numpy(part.copy()) for part in side.row(index))
            logps_TV = model(ids[None].long()).logits[0, :-1].log_softmax(-1)
            own_T = logps_TV.gather(1, ids[1:, None].long())[:, 0]
            found.append(own_T[scored[1:]].sum())
    return torch.stack(found).view(2, -1).T


def by_hand(ratios_N2: torch.Tensor, lengths_N2: torch.Tensor, objective: DpoSpec) -> torch.Tensor:
    beta, delta = objective.beta, ratios_N2[:, 0] - ratios_N2[:, 1]
    if objective.loss_type == "sigmoid":
        return (1 + (-beta * delta).exp()).log().mean()
    if objective.loss_type == "hinge":
        return (1 - beta * delta).clamp(min=0).mean()
    if objective.loss_type == "ipo":
        means = ratios_N2 / lengths_N2
        return (means[:, 0] - means[:, 1] - 1 / (2 * beta)).square().mean()
    e = objective.label_smoothing
    right, swapped = (1 + (-beta * delta).exp()).log(), (1 + (beta * delta).exp()).log()
    return (((1 - e) * right - e * swapped) / (1 - 2 * e)).mean()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss["loss_type"]))
def test_the_loss_of_a_step_and_of_held_out_pairs_is_the_papers(folder: Path, loss: dict[str, Any]) -> None:
    """Pinned to plain torch over a plain transformers model, the reference being the model without adapter."""
    spec = pair_task(folder, **{"quant.kind": "none", "objective": {"kind": "dpo", "beta": 0.3, **loss}})
    setting = setting_of(spec, folder)
    training = build(setting)
    shake(setting.model)
    rows, indices = setting.job.data.train, [0, 1, 2, 3]
    assert isinstance(rows, PairRows)
    assert isinstance(spec.objective, DpoSpec)
    inputs = training.trainer.data_collator([{"row": index} for index in indices])
    ours = training.trainer.compute_loss(setting.model, inputs)
    plain = AutoModelForCausalLM.from_pretrained(setting.base.folder, dtype=torch.float32)
    with torch.no_grad():
        reference = answer_logps_by_hand(plain, rows, indices)
    np.testing.assert_allclose(inputs["ref_chosen_logps"], reference[:, 0], rtol=1e-5)
    ratios = answer_logps_by_hand(setting.model, rows, indices) - reference
    lengths = torch.tensor([[rows.chosen.scored_N[i], rows.rejected.scored_N[i]] for i in indices])
    expected = by_hand(ratios, lengths, spec.objective)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert dpo.pair_losses(spec.objective, ratios, lengths).mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_run_learns_the_preference_as_trl_does(folder: Path) -> None:
    """TRL's plain DPOTrainer with its own reference and collator, fed the same pairs in the same order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    spec = pair_task(folder, **{"quant.kind": "none", "optim.epochs": 4, "optim.lr": 5e-3, "optim.micro_batch": 8})
    setting = setting_of(spec, folder)
    rows = setting.job.data.train
    assert isinstance(rows, PairRows)
    seen: list[StepReport] = []

    def see(step: StepReport) -> bool:
        seen.append(step)
        return True

    result = run_steps(setting.job, see)

    def example(index: int) -> dict[str, list[int]]:
        start = int((~rows.chosen.row(index)[1]).sum())
        ids = {"chosen_ids": rows.chosen.row(index)[0], "rejected_ids": rows.rejected.row(index)[0]}
        return {"prompt_ids": ids["chosen_ids"][:start].tolist(), **{k: v[start:].tolist() for k, v in ids.items()}}

    class Untouched(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    from graftwork.training.objectives.trainer import arguments

    fed = Dataset.from_list([example(index) for index in setting.plan.rows_SR.reshape(-1).tolist()])
    trl = Untouched(
        model=copy.deepcopy(setting.model),
        args=DPOConfig(**arguments(setting), beta=0.1, max_length=None),
        train_dataset=fed,
        processing_class=setting.tokenizer(),
    )
    trl.train()
    theirs = [entry["loss"] for entry in trl.state.log_history if "loss" in entry]
    assert [loss for _, loss in result.train_loss] == pytest.approx(theirs, rel=2e-3, abs=1e-4)
    assert seen[0].metrics["rewards/margins"] == 0
    assert seen[0].loss == pytest.approx(np.log(2), rel=1e-6)
    assert seen[-1].metrics["eval_accuracy"] >= 0.9
    assert seen[-1].metrics["eval_margin"] > 0.2
    assert "reference: 50 pairs scored once, 200 would be scored with the policy" in result.notes


def test_a_run_goes_on_with_the_reference_it_began_with(folder: Path) -> None:
    spec = pair_task(folder, **{"quant.kind": "none", "optim.epochs": 1, "checkpoint_every": 2})
    data = prepare(spec)
    whole = run_steps(TrainJob(spec, data), lambda _: True)
    run = RunPaths(Store(spec.root), spec.name, "0" * 64)
    run_steps(TrainJob(spec, data, run), lambda step: step.step < 3)
    assert len(run.store.read_json(*run.file("train-reference.json"))) == 40
    resumed = run_steps(TrainJob(spec, data, run), lambda _: True)
    assert dict(resumed.train_loss) == pytest.approx(dict(whole.train_loss), rel=1e-4)


def test_both_answers_follow_the_same_prompt_and_end_with_their_turn(folder: Path) -> None:
    spec = pair_task(folder)
    rows = prepare(spec).train
    template = base_model.template(base_model.resolve(spec.base))
    assert isinstance(rows, PairRows)
    for index in range(4):
        (chosen, better), (rejected, worse) = rows.chosen.row(index), rows.rejected.row(index)
        start = int((~better).sum())
        assert chosen[:start].tolist() == rejected[:start].tolist()
        assert worse.tolist() == [False] * start + [True] * (len(worse) - start)
        assert {chosen[-1], rejected[-1]} <= template.stop_ids
    batch = rows.collate([0, 1], 2)
    assert batch["completion_mask"].sum() == rows.scored_N[:2].sum()
    assert batch["attention_mask"].sum() == rows.lengths_N[:2].sum()


BAD_ROWS = [
    ({"prompt": "a", "chosen": "x", "rejected": "x"}, "row 1: chosen: it is the same text as rejected ('x')"),
    ({"prompt": "a", "chosen": "x"}, "row 1: rejected: the field is missing"),
    ({"prompt": "a", "chosen": " ", "rejected": "x"}, "row 1: chosen: it is empty"),
    ({"prompt": "a", "chosen": 3, "rejected": "x"}, "row 1: chosen: found"),
    ({"prompt": "a", "chosen": {"role": "user", "content": "x"}, "rejected": "y"}, "row 1: chosen.role: found 'user'"),
    ({"prompt": "a", "chosen": [], "rejected": "y"}, "row 1: chosen: found 0 turns"),
    ({"chosen": "x", "rejected": "y"}, "row 1: prompt: the field is missing"),
    (
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "chosen": "x",
            "rejected": "y",
        },
        "row 1: messages: the last turn is the assistant's",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_named_with_its_field(folder: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="Rule: ") as error:
        prepare(pair_task(folder, **{"data.train": str(tmp_path / "bad.jsonl")}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "dpo", "label_smoothing": 0.1}}, "it belongs to loss_type=robust"),
        ({"objective": {"kind": "dpo", "loss_type": "robust"}}, "needs one above 0"),
        ({"strategy.kind": "zero3"}, "Set strategy.kind=fsdp2 or zero2"),
        ({"adapter.dropout": 0.1}, "TRL switches dropout off"),
        ({"data.context": {"corpus": "c.jsonl"}}, "data.context can't take effect with objective.kind=dpo"),
    ],
)
def test_what_can_take_no_effect_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        pair_task(folder, **changes)
