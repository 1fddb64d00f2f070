"""Trials trained together in one process against the loop that trains one: the same numbers, whoever is beside."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.errors import RunError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import PreparedData, prepare
from graftwork.training.planning.memory import predict_training
from graftwork.training.worker_messages import NonFiniteLoss, StepReport, TrainJob
from graftwork.tuning.multi_lora.group import can_share, group_of, predict_together, why_alone
from graftwork.tuning.multi_lora.layers import short_rows
from graftwork.tuning.multi_lora.train import run_together, summed_losses
from graftwork.tuning.plan import search_of
from graftwork.tuning.search import rows_key, rows_points, trial_spec
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial_store import Ledger
from graftwork.tuning.trials import TrialRecord
from tests.families import config_of
from tests.training import task

STEPS = 5
TRIALS: dict[str, dict[str, Any]] = {
    "first": {"adapter.rank": 4, "optim.lr": 5e-3},
    "decayed": {"adapter.rank": 4, "adapter.alpha": 8, "optim.lr": 2e-3, "optim.weight_decay": 0.1},
    "stable": {"adapter.rank": 4, "optim.betas": [0.8, 0.9], "optim.schedule": "wsd", "optim.decay_ratio": 0.5},
    "wide": {"adapter.rank": 8, "adapter.rslora": True, "optim.schedule": "cosine", "optim.warmup_ratio": 0.3},
    "clipped": {
        "adapter.rank": 2,
        "optim.max_grad_norm": 0.1,
        "optim.schedule": "constant",
        "optim.factors": [[0.5, 0.5]],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


def job_of(folder: Path, *, steps: int = STEPS, **changes: Any) -> TrainJob:
    plain = {"quant.kind": "none", "num_workers": 1, "optim.rows_per_step": 4, "optim.micro_batch": 2}
    spec = task(folder, **{**plain, **changes})
    return TrainJob(spec, prepare(spec), max_steps=steps, report_every=1, eval_every=1)


def alone(job: TrainJob) -> list[StepReport]:
    found: list[StepReport] = []

    def report(step: StepReport) -> bool:
        found.append(step)
        return True

    run_steps(job, report)
    return found


class Seen:
    """What the loop of several reports; `last` is the step after which a trial is stopped."""

    def __init__(self, last: Mapping[str, int] | None = None) -> None:
        self.last = last or {}
        self.steps: dict[str, list[StepReport]] = {}
        self.lost: dict[str, RunError] = {}

    def __call__(self, steps: Mapping[str, StepReport], lost: Mapping[str, RunError]) -> dict[str, bool]:
        for key, step in steps.items():
            self.steps.setdefault(key, []).append(step)
        self.lost.update(lost)
        return {key: step.step < self.last.get(key, STEPS) for key, step in steps.items()}


def same(found: list[StepReport], expected: list[StepReport], rel: float = 1e-5) -> None:
    assert [step.step for step in found] == [step.step for step in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "eval_loss", "grad_norm", "lr"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=rel), (ours.step, name)
        assert (ours.tokens, ours.total_steps) == (theirs.tokens, theirs.total_steps)


@pytest.fixture(scope="module")
def one_by_one(folder: Path) -> dict[str, list[StepReport]]:
    return {key: alone(job_of(folder, **changes)) for key, changes in TRIALS.items()}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_trial_takes_the_steps_that_it_takes_alone(
    folder: Path, one_by_one: dict[str, list[StepReport]], count: int
) -> None:
    keys = list(TRIALS)[:count]
    seen = Seen()
    run_together({key: job_of(folder, **TRIALS[key]) for key in keys}, seen)
    for key in keys:
        same(seen.steps[key], one_by_one[key])
    assert not seen.lost


def test_a_trial_that_leaves_does_not_disturb_the_others(folder: Path, one_by_one: dict[str, list[StepReport]]) -> None:
    """One is stopped, one diverges in its third step, and both stood between those that stay."""
    diverging: dict[str, Any] = {"adapter.rank": 4, "optim.lr": 1e38, "optim.schedule": "constant"}
    seen = Seen({"decayed": 2})
    jobs = {key: job_of(folder, **changes) for key, changes in {**TRIALS, "diverging": diverging}.items()}
    run_together(jobs, seen)
    same(seen.steps["decayed"], one_by_one["decayed"][:2])
    for key in ("first", "wide", "clipped"):
        same(seen.steps[key], one_by_one[key])
    assert [*seen.lost] == ["diverging"]
    assert "step 2 of 5: the held-out loss is nan" in str(seen.lost["diverging"])


def test_a_loss_that_is_no_number_is_noticed_at_its_step(folder: Path) -> None:
    diverging: dict[str, Any] = {"adapter.rank": 4, "optim.lr": 1e38, "optim.schedule": "constant"}
    job = replace(job_of(folder, **diverging), eval_every=STEPS)
    with pytest.raises(NonFiniteLoss) as error:
        alone(job)
    seen = Seen()
    run_together({"diverging": job}, seen)
    assert str(seen.lost["diverging"]).startswith(str(error.value).partition(";")[0])
    assert [step.step for step in seen.steps["diverging"]] == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"quant.kind": "nf4", "quant.resident": "packed", "optim.gradient_checkpointing": True},
        {"objective": {"kind": "sft", "packing": "best_fit"}, "max_length": 96, "adapter.targets": "mlp"},
    ],
    ids=["packed nf4, checkpointing", "packed rows, some targets"],
)
def test_other_bases_rows_and_targets(folder: Path, changes: dict[str, Any]) -> None:
    jobs = {key: job_of(folder, steps=2, **TRIALS[key], **changes) for key in ("first", "clipped")}
    seen = Seen()
    run_together(jobs, seen)
    same(seen.steps["clipped"], alone(jobs["clipped"]))


def test_trials_that_differ_in_what_each_has_of_its_own_can_share(folder: Path) -> None:
    specs = [job_of(folder, **changes).spec for changes in TRIALS.values()]
    assert all(can_share(specs[0], other) for other in specs)
    others: dict[str, Any] = {"adapter.targets": "mlp", "seed": 1, "optim.micro_batch": 1, "quant.kind": "nf4"}
    for key, value in others.items():
        assert not can_share(specs[0], job_of(folder, **{key: value}).spec), key


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({"optim.kind": "muon"}, {}, "optim.kind=muon"),
        ({"adapter.modules_to_save": ["lm_head"]}, {}, "adapter.modules_to_save"),
        ({"adapter.dora": True}, {}, "adapter.dora"),
        ({"adapter.dropout": 0.1}, {}, "adapter.dropout=0.1"),
        ({"adapter": {"kind": "ia3"}}, {}, "adapter.kind=ia3"),
        ({"objective": {"kind": "sft", "answers": {}}}, {}, "objective.answers"),
        ({"num_workers": 2}, {}, "num_workers=2"),
        ({}, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({}, {"num_local_experts": 8}, "num_local_experts"),
    ],
    ids=str,
)
def test_what_goes_alone_says_why(folder: Path, changes: dict[str, Any], config: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {"quant.kind": "none", "num_workers": 1, **changes}
    spec = task(folder, **given)
    found = why_alone(spec, config)
    assert found is not None
    assert reason in found
    assert bool(config) or not can_share(spec, spec)
    assert why_alone(job_of(folder).spec, {"attention_dropout": 0.0, "hidden_size": 64}) is None


def tune_spec(folder: Path, space: Mapping[str, list[Any]]) -> TuneSpec:
    train = job_of(folder).spec.model_dump(mode="json")
    listed = {key: {"kind": "choice", "values": values} for key, values in space.items()}
    given = {"name": "sweep", "root": str(folder / "sweeps"), "train": train, "space": listed, "num_trials": 16}
    return TuneSpec.model_validate({**given, "steps": 4, "report_every": 2, "scheduler": None, "share_base": 3})


def groups(spec: TuneSpec, data: Mapping[str, PreparedData], smaller: int | None = None) -> list[list[str]]:
    """The notes of each group's trials, in the order in which the groups start. `smaller`: number of one that ran out
    of memory before."""
    ledger, search = Ledger(RunPaths(Store(spec.root), spec.name, "0" * 64)), search_of(spec)
    found = []
    while isinstance(first := ledger.next(search), TrialRecord):
        if smaller == len(ledger.trials) - 1:
            ledger.update(first.trial_id, smaller=1)
            first = ledger.records[first.trial_id]
        group = group_of(
            first,
            spec.share_base,
            ledger,
            search,
            lambda trial: trial_spec(spec, trial.values),
            data[rows_key(first.values)],
        )
        found.append(
            [ledger.records[trial_id].notes[-1] if ledger.records[trial_id].notes else "" for trial_id in group]
        )
        assert all(ledger.records[trial_id].state == "running" for trial_id in group)
    return found


def test_trials_go_together_as_they_are_chosen(folder: Path) -> None:
    spec = tune_spec(folder, {"adapter.dropout": [0.0, 0.1], "adapter.rank": [2, 4], "optim.lr": [1e-3, 2e-3]})
    data = {"{}": job_of(folder).data}
    found = groups(spec, data)
    assert [len(group) for group in found] == [3, 1, 1, 1, 1, 1], "nobody is left for the fourth without dropout"
    assert all(note.startswith("trained in one process with ") for note in found[0])
    assert found[1] == [""], "it could have shared, and there was nobody left to share with"
    assert found[2][0].startswith("trained alone: adapter.dropout=0.1")
    assert groups(spec, data, smaller=0)[0] == ["trained alone: it ran out of memory before"]


def test_trials_with_other_rows_are_no_group(folder: Path) -> None:
    spec = tune_spec(folder, {"optim.lr": [1e-3, 2e-3], "seed": [0, 1]})
    data = {rows_key(point): job_of(folder).data for point in rows_points(spec)}
    assert [len(group) for group in groups(spec, data)] == [2, 2], "each takes the next that has its rows"


def test_losses_of_copies_and_their_gradients_are_torchs() -> None:
    torch.manual_seed(0)
    logits_NV, targets_N = torch.randn(12, 3 * 2**19 // 12, requires_grad=True), torch.randint(0, 100, (12,))
    theirs = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").view(3, 4).sum(1)
    ours = summed_losses(logits_NV, targets_N, 3)
    torch.testing.assert_close(ours, theirs)
    weights_C = torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(*(torch.autograd.grad(sums @ weights_C, logits_NV)[0] for sums in (ours, theirs)))


def test_attention_of_short_rows_is_torchs() -> None:
    torch.manual_seed(0)
    sizes = ((6, 8), (2, 8), (2, 5))  # values may be of another size, as in latent attention
    q, k, v = (torch.randn(2, 7, *size).transpose(1, 2).requires_grad_() for size in sizes)
    ours = short_rows(q, k, v, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    by_name = [torch.autograd.grad(found.square().sum(), (q, k, v)) for found in (ours, theirs)]
    torch.testing.assert_close(*by_name)


def test_in_bfloat16_short_rows_take_their_own_way(folder: Path) -> None:
    changes = {"quant.dtype": "bfloat16", "quant.kind": "none"}
    jobs = {key: job_of(folder, steps=2, **TRIALS[key], **changes) for key in ("first", "clipped")}
    seen = Seen()
    run_together(jobs, seen)
    same(seen.steps["clipped"], alone(jobs["clipped"]), rel=0.05)


def test_a_process_of_several_takes_the_base_once(folder: Path) -> None:
    specs = [job_of(folder, **{"adapter.rank": rank}).spec for rank in (2, 4, 8)]
    shape = ModelShape.from_config(base_model.resolve(specs[0].base).config)
    one, all_three = predict_training(specs[2], shape), predict_together(specs, shape)
    assert all_three.part("base weights") == one.part("base weights")
    assert all_three.part("optimizer") == sum(predict_training(spec, shape).part("optimizer") for spec in specs)
    assert one.peak_bytes < all_three.peak_bytes < 3 * one.peak_bytes


def test_scores_are_planned_for_all_trials(folder: Path) -> None:
    """Gemma-2's attention keeps its scores, whose gradients are larger than these logits."""
    specs = [job_of(folder, **{"adapter.rank": 2, "max_length": 512}).spec for _ in range(3)]
    shape = ModelShape.from_config(config_of("gemma2"))
    one, all_three = predict_training(specs[0], shape), predict_together(specs, shape)
    assert all_three.part("logits") == pytest.approx(3 * one.part("logits"))
