"""CPO, ORPO and KTO: losses and weights against TRL's own trainers, micro-batches, rows, what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import TrainerCallback

from graftwork.base import load as base_model
from graftwork.errors import ConfigError, DataError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.loop import plan_of, run_steps
from graftwork.training.objectives.dpo import PairRows
from graftwork.training.objectives.kto import LabelledRows, MixedRows, mismatched
from graftwork.training.objectives.orpo import log_odds
from graftwork.training.objectives.rows import TokenRows, prepare
from graftwork.training.objectives.trainer import TrainerContext, arguments, build
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob
from tests.families import write_family
from tests.training import labelled_task, pair_task, write_labelled

WHOLE = {"quant.kind": "none", "optim.lr": 5e-3, "optim.micro_batch": 8, "num_workers": 1}
"""One forward pass a step, as TRL has it without accumulation."""
PAIR_LOSSES: list[dict[str, Any]] = [
    {"kind": "cpo", "beta": 0.3},
    {"kind": "cpo", "label_smoothing": 0.1, "cpo_alpha": 0.5},
    {"kind": "cpo", "loss_type": "hinge"},
    {"kind": "cpo", "loss_type": "ipo"},
    {"kind": "cpo", "loss_type": "simpo", "cpo_alpha": 0, "beta": 2.0, "simpo_gamma": 1.0},
    {"kind": "orpo"},
    {"kind": "orpo", "beta": 0.5},
]
KTO_LOSSES: list[dict[str, Any]] = [
    {"kind": "kto", "beta": 0.3},
    {"kind": "kto", "desirable_weight": 1.5},
    {"kind": "kto", "loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


def setting_of(spec: TrainSpec, folder: Path, steps: int = 3) -> TrainerContext:
    job = TrainJob(spec, prepare(spec), max_steps=steps)
    base = base_model.resolve(spec.base)
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    torch.manual_seed(spec.seed)
    model = attach(loaded.model, spec.adapter).double()  # Adam amplifies the rounding of fp32
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # away from zero, so that all weights have gradients
            torch.nn.init.normal_(parameter, std=0.02)
    return TrainerContext(job, plan_of(job, 1), base, model, folder / "out", TrainerCallback())


class Losses(TrainerCallback):  # type: ignore[misc]
    """Collects the logged losses of a trainer."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.found += [logs["loss"]] if "loss" in logs else []


def trained(trainer: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps and the weights at the end."""
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train()
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return losses.found, weights


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def split(rows: TokenRows, index: int) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer."""
    ids, scored = rows.row(index)
    return ids[~scored].tolist(), ids[scored].tolist()


def trl_pair_trainer(setting: TrainerContext, objective: dict[str, Any]) -> Any:
    """TRL's CPOTrainer or ORPOTrainer with its own collator, on the same pairs in the same order."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = setting.job.data.train
    assert isinstance(rows, PairRows)
    examples = []
    for index in setting.plan.rows_SR.reshape(-1).tolist():
        prompt, chosen = split(rows.chosen, index)
        rejected = split(rows.rejected, index)[1]
        sides = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        columns: dict[str, Any] = {
            "prompt": "p",
            "prompt_input_ids": prompt,
            "prompt_attention_mask": [1] * len(prompt),
        }
        for side, ids in sides.items():
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            columns |= {side: "a", f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
            columns[f"{side}_labels"] = labels
        examples.append(columns)
    kind = str(objective["kind"])
    config, trainer = (CPOConfig, CPOTrainer) if kind == "cpo" else (ORPOConfig, ORPOTrainer)

    class Tokenised(trainer):  # type: ignore[misc, valid-type]
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

    keys = {key: value for key, value in objective.items() if key != "kind"}
    return Tokenised(
        model=copy.deepcopy(setting.model),
        args=config(**arguments(setting), max_length=512, **keys),
        train_dataset=Dataset.from_list(examples),
        processing_class=setting.tokenizer(),
    )


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("objective", PAIR_LOSSES, ids=lambda objective: "-".join(map(str, objective.values())))
def test_pair_losses_and_weights_are_trls(folder: Path, objective: dict[str, Any]) -> None:
    setting = setting_of(pair_task(folder, **WHOLE, objective=objective), folder)
    theirs = trained(trl_pair_trainer(setting, objective))
    ours = trained(build(setting).trainer)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    assert difference(ours[1], theirs[1]) < 1e-6
    assert len(ours[0]) == 3


def trl_kto_trainer(setting: TrainerContext, objective: dict[str, Any]) -> Any:
    """TRL's KTOTrainer with its own reference, collator and mismatched answers; a batch is a step's rows by length."""
    from trl import KTOConfig, KTOTrainer

    rows = setting.job.data.train
    assert isinstance(rows, LabelledRows)
    order = mismatched(setting.plan.rows_SR, rows.lengths_N)[:, :, 0].reshape(-1)
    examples = []
    for index in order.tolist():
        prompt, answer = split(rows.answers, index)
        examples.append({"prompt_ids": prompt, "completion_ids": answer, "label": bool(rows.labels_N[index])})
    for start in range(0, len(examples), setting.plan.rows_SR.shape[1]):
        step = examples[start : start + setting.plan.rows_SR.shape[1]]
        for place, example in enumerate(step):
            example["KL_completion_ids"] = step[place - 1]["completion_ids"]

    class Tokenised(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    keys = {key: value for key, value in objective.items() if key != "kind"}
    return Tokenised(
        model=copy.deepcopy(setting.model),
        args=KTOConfig(**arguments(setting), max_length=setting.job.spec.max_length, **keys),
        train_dataset=Dataset.from_list(examples),
        processing_class=setting.tokenizer(),
    )


@pytest.mark.parametrize("objective", KTO_LOSSES, ids=lambda objective: "-".join(map(str, objective.values())))
def test_kto_losses_and_weights_are_trls(folder: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    """The reference is the adapter as training begins (`init_from`), as TRL takes it; its rows are scored once."""
    spec = labelled_task(folder, **{**WHOLE, "optim.lr": 2e-2}, objective=objective)
    setting = setting_of(spec, folder)
    kept = copy.deepcopy(setting.model.state_dict())
    theirs_trainer = trl_kto_trainer(setting, objective)
    theirs = trained(theirs_trainer)
    setting.model.load_state_dict(kept)
    given = TrainerContext(
        TrainJob(spec.model_copy(update={"init_from": "colours@latest"}), setting.job.data, max_steps=3),
        setting.plan,
        setting.base,
        setting.model,
        setting.folder,
        TrainerCallback(),
    )
    ours = trained(build(given).trainer)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    assert difference(ours[1], theirs[1]) < 1e-6


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize(
    "objective", [{"kind": "cpo"}, {"kind": "orpo"}, {"kind": "kto"}], ids=lambda one: str(one["kind"])
)
def test_the_loss_of_a_router_is_added_as_in_trl(tmp_path: Path, objective: dict[str, Any]) -> None:
    """A tiny Mixtral: its load-balancing loss is part of every step."""
    write_family(tmp_path / "base", "mixtral")
    made = labelled_task if objective["kind"] == "kto" else pair_task
    setting = setting_of(made(tmp_path, objective=objective, **WHOLE), tmp_path)
    setting.model.float()  # grouped products have no fp64
    setting.model.config.output_router_logits = True
    theirs = (trl_kto_trainer if objective["kind"] == "kto" else trl_pair_trainer)(setting, objective)
    assert theirs.aux_loss_enabled
    given = replace(setting.job, spec=setting.job.spec.model_copy(update={"init_from": "colours@latest"}))
    ours = build(replace(setting, job=given)).trainer
    expected, found = trained(theirs), trained(ours)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert difference(found[1], expected[1]) < 1e-4


RUNS: list[dict[str, Any]] = [
    {"kind": "cpo", "loss_type": "simpo"},
    {"kind": "orpo"},
    {"kind": "kto", "undesirable_weight": 2.0},
]


def task_of(folder: Path, objective: dict[str, Any], **changes: Any) -> TrainSpec:
    made = labelled_task if objective["kind"] == "kto" else pair_task
    common = {"quant.kind": "none", "optim.epochs": 1, "optim.lr": 2e-2, "checkpoint_every": 2}
    return made(folder, objective=objective, **{**common, **changes})


def run(job: TrainJob) -> tuple[list[dict[str, float]], LoopResult]:
    """Figures of each step, and the result."""
    seen: list[dict[str, float]] = []

    def see(step: StepReport) -> bool:
        seen.append(dict(step.metrics))
        return True

    return seen, run_steps(job, see)


@pytest.mark.parametrize("objective", RUNS, ids=lambda objective: str(objective["kind"]))
def test_a_step_is_the_same_whatever_the_micro_batch(folder: Path, objective: dict[str, Any]) -> None:
    """Means over answers, over tokens and of the KL are those of the step, not of its forward passes."""
    accuracy = "eval_label_accuracy" if objective["kind"] == "kto" else "eval_accuracy"
    losses: list[list[float]] = []
    figures: list[list[dict[str, float]]] = []
    for micro_batch in (1, 8):
        spec = task_of(folder, objective, **{"optim.micro_batch": micro_batch, "num_workers": 1})
        found, result = run(TrainJob(spec, prepare(spec)))
        losses.append([loss for _, loss in result.train_loss])
        figures.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert figures[0][-1][accuracy] == figures[1][-1][accuracy]
    if objective["kind"] == "kto":
        estimates = [[step["kl"] for step in steps] for steps in figures]
        assert estimates[0] == pytest.approx(estimates[1], rel=1e-3, abs=1e-6)
        assert max(estimates[0]) > 0


@pytest.mark.parametrize("objective", RUNS, ids=lambda objective: str(objective["kind"]))
def test_a_run_goes_on_as_if_it_had_never_stopped(folder: Path, objective: dict[str, Any]) -> None:
    spec = task_of(folder, objective)
    data = prepare(spec)
    whole = run_steps(TrainJob(spec, data), lambda _: True)
    paths = RunPaths(Store(spec.root), str(objective["kind"]), "0" * 64)
    run_steps(TrainJob(spec, data, paths), lambda step: step.step < 3)
    resumed = run_steps(TrainJob(spec, data, paths), lambda _: True)
    assert dict(resumed.train_loss) == dict(whole.train_loss)
    assert paths.store.exists(*paths.file("train-kl-reference.json")) == (objective["kind"] == "kto")


@pytest.mark.parametrize("objective", RUNS, ids=lambda objective: str(objective["kind"]))
def test_a_run_learns_good_answers_and_unlearns_bad_ones(folder: Path, objective: dict[str, Any]) -> None:
    spec = task_of(folder, objective, **{"optim.epochs": 6})
    seen, result = run(TrainJob(spec, prepare(spec)))
    last = seen[-1]
    assert last["eval_label_accuracy" if objective["kind"] == "kto" else "eval_accuracy"] >= 0.85
    assert last["eval_rewards/chosen"] > last["eval_rewards/rejected"] + 0.05
    assert last["rewards/chosen"] > last["rewards/rejected"]
    assert result.train_loss[-1][1] < result.train_loss[0][1]


@pytest.mark.parametrize(
    "objective", [*PAIR_LOSSES, *KTO_LOSSES], ids=lambda objective: "-".join(map(str, objective.values()))
)
def test_held_out_losses_are_those_of_a_step_on_the_same_rows(folder: Path, objective: dict[str, Any]) -> None:
    """Held-out rows are scored without a step: the same formulas, summed over all rows."""
    made = labelled_task if objective["kind"] == "kto" else pair_task
    spec = made(folder, objective=objective, **{**WHOLE, "data.train_rows": 8})
    data = prepare(spec)
    setting = setting_of(spec, folder, steps=1)
    job = TrainJob(spec, replace(data, eval=data.train), max_steps=1)
    built = build(replace(setting, job=job))
    batch = built.trainer.data_collator([{"row": row} for row in range(8)])
    step = built.trainer.compute_loss(setting.model, batch).item()
    assert built.evaluate()["loss"] == pytest.approx(step, rel=1e-5)


def test_every_form_of_a_row_gives_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    files = [write_labelled(tmp_path / f"{form}.jsonl", 6, form=form) for form in range(3)]
    rows = [prepare(labelled_task(folder, **{"data.train": str(file)})).train for file in files]
    assert {one.digest() for one in rows} == {rows[0].digest()}


def test_log_odds_have_a_gradient_where_a_probability_rounds_to_one() -> None:
    """Against fp64, from p = 1e-9 to 1 - 1e-7."""
    p = torch.tensor([1e-9, 0.01, 0.5, 0.99, 1 - 1e-7], dtype=torch.float64)
    logps = p.log().float().requires_grad_()
    found = log_odds(logps)
    found.sum().backward()
    torch.testing.assert_close(found.detach().double(), (p / (1 - p)).log(), rtol=1e-2, atol=1e-6)
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad.double(), 1 / (1 - p), rtol=0.3, atol=0)
    tiny = torch.tensor([-1e-9], requires_grad=True)
    log_odds(tiny).sum().backward()
    assert tiny.grad is not None
    assert bool(tiny.grad.isfinite().all())


def test_mismatched_answers_follow_their_prompts_and_are_cut(folder: Path) -> None:
    rows = prepare(labelled_task(folder)).train
    assert isinstance(rows, LabelledRows)
    mixed = MixedRows(rows, mismatched(np.array([[3, 0, 2], [1, 4, 5]]), rows.lengths_N).reshape(-1, 2), 20)
    batch = mixed.collate(range(6), pad_id=0)
    for place, (prompt, answer) in enumerate(mixed.pairs_P2.tolist()):
        whole = [*split(rows.answers, prompt)[0], *split(rows.answers, answer)[1]][:20]
        assert prompt != answer
        assert batch["input_ids"][place, : len(whole)].tolist() == whole
        assert mixed.lengths_N[place] == len(whole) == int(batch["attention_mask"][place].sum())
        assert mixed.scored_N[place] == int(batch["completion_mask"][place].sum())
    assert sorted(mixed.pairs_P2[:, 0]) == sorted(mixed.pairs_P2[:, 1]) == [0, 1, 2, 3, 4, 5]


BAD_ROWS = [
    ({"prompt": "a", "completion": "x"}, "row 1: label: the field is missing"),
    ({"prompt": "a", "completion": "x", "label": "good"}, "row 1: label: found 'good'"),
    ({"prompt": "a", "completion": "x", "label": None}, "row 1: label: the field is missing"),
    ({"prompt": "a", "completion": "x", "label": [True]}, "row 1: label: found [True]"),
    ({"prompt": "a", "label": True}, "row 1: completion: the field is missing"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_named_with_its_field(folder: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        prepare(labelled_task(folder, **{"data.train": str(tmp_path / "bad.jsonl")}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("labels", "weights", "warning"),
    [
        ([True] * 4, {}, "label is true in all 4 rows"),
        (
            [True, False, False, False, False],
            {},
            "set objective.desirable_weight=4 or objective.undesirable_weight=0.25",
        ),
        ([True, False, False, False, False], {"desirable_weight": 4.0}, ""),
        ([True, True, True, False], {"undesirable_weight": 3.0}, ""),
    ],
)
def test_labels_that_outweigh_each_other_are_reported(
    folder: Path, tmp_path: Path, labels: list[bool], weights: dict[str, float], warning: str
) -> None:
    rows = [{"prompt": f"a {n}", "completion": f"x{n}", "label": label} for n, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.train": str(tmp_path / "rows.jsonl"), "objective": {"kind": "kto", **weights}}
    found = " ".join(prepare(labelled_task(folder, **changes)).warnings)
    assert warning in found
    assert ("label" in found) == bool(warning)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "cpo", "loss_type": "ipo", "label_smoothing": 0.1}}, "belongs to loss_type=sigmoid"),
        ({"objective": {"kind": "cpo", "simpo_gamma": 1.0}}, "set loss_type=simpo"),
        ({"objective": {"kind": "kto", "desirable_weight": 2, "undesirable_weight": 2}}, "Leave one of them at 1"),
        ({"objective": {"kind": "kto"}, "optim.rows_per_step": 1, "num_workers": 1}, "Set optim.rows_per_step=8"),
        ({"objective": {"kind": "orpo"}, "strategy.kind": "zero3"}, "Set strategy.kind=fsdp2 or zero2"),
        ({"objective": {"kind": "kto"}, "adapter.dropout": 0.1}, "adapter.dropout=0.1 can't take effect"),
    ],
)
def test_what_can_take_no_effect_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        pair_task(folder, **changes)
