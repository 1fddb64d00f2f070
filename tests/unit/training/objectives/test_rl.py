"""GRPO and RLOO on a tiny model in this process: answers against transformers' own, losses against plain torch."""

from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, set_seed

from graftwork import plugins
from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.base import load as base_model
from graftwork.errors import ArtifactError, DataError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import plan_of, run_steps
from graftwork.training.objectives.reward_head import load_scorer
from graftwork.training.objectives.rl import PromptRows, prompts_of
from graftwork.training.objectives.rl_rollout import RewardScorer, RolloutSampling, sample
from graftwork.training.objectives.rows import prepare
from graftwork.training.objectives.trainer import TrainerContext, build
from graftwork.training.rewards import GROUP, BadReward
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport, TrainJob, read_steps
from tests.adapters import facts
from tests.ranks import Task, train_on
from tests.training import pair_task, task

VOWEL = {"name": "regex", "pattern": "[aeiou]", "whole": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rl")


def rl_task(folder: Path, kind: str = "grpo", /, **changes: Any) -> TrainSpec:
    objective = {"kind": kind, "generations": 4, "max_new_tokens": 6, "rewards": [VOWEL]}
    optim = {"lr": 2e-2, "epochs": 1, "rows_per_step": 4, "micro_batch": 2, "warmup_ratio": 0.0}
    return task(folder, **{"objective": objective, "optim": optim, "data.train_rows": 16, **changes})


def setting_of(spec: TrainSpec, folder: Path) -> TrainerContext:
    job, base = TrainJob(spec, prepare(spec)), base_model.resolve(spec.base)
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    set_seed(spec.seed)
    model = attach(loaded.model, spec.adapter)
    return TrainerContext(job, plan_of(job, 1), base, model, folder / "out", TrainerCallback())


def moved(model: Any, seed: int) -> None:
    """Give the adapter something to say, another for each seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_greedy_answers_are_those_of_transformers(folder: Path, kind: str) -> None:
    setting = setting_of(rl_task(folder, **{"quant.kind": kind}), folder)
    rows, model = setting.job.data.train, setting.model
    assert isinstance(rows, PromptRows)
    moved(model, 1)
    stops = base_model.template(setting.base).stop_ids
    ours = sample(model, rows, range(6), 1, [(0,)] * 6, RolloutSampling(12, stops, setting.job.data.pad_id))
    model.eval()
    for index, answer in enumerate(ours):
        prompt = torch.tensor([rows.ids(index)])
        theirs = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=sorted(stops),
        )
        assert answer == theirs[0, prompt.shape[1] :].tolist()


def test_an_answer_depends_on_its_own_key_alone(folder: Path) -> None:
    setting = setting_of(rl_task(folder), folder)
    rows, model = setting.job.data.train, setting.model
    assert isinstance(rows, PromptRows)
    stops = frozenset(range(0, 512, 9))  # a ninth of the vocabulary ends an answer: rows leave the batch all the time
    sampling = RolloutSampling(10, stops, setting.job.data.pad_id, temperature=0.9, top_p=0.95)
    keys = [(7, row, copy) for row in range(5) for copy in range(4)]
    together = sample(model, rows, range(5), 4, keys, sampling)
    alone = [
        answer for row in range(5) for answer in sample(model, rows, [row], 4, keys[4 * row : 4 * row + 4], sampling)
    ]
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 15
    for answer in together:
        assert not stops & {*answer[:-1]}
        assert answer[-1] in stops or len(answer) == 10
    assert sample(model, rows, [1], 4, [(7, 1, copy) for copy in range(4)], sampling) == together[4:8]


def test_tokens_are_drawn_by_their_probabilities(folder: Path) -> None:
    """The first token of 4,000 answers, against the model's own distribution cut at top_p."""
    setting = setting_of(rl_task(folder), folder)
    rows, model = setting.job.data.train, setting.model
    assert isinstance(rows, PromptRows)
    sampling = RolloutSampling(1, frozenset(), setting.job.data.pad_id, temperature=0.7, top_p=0.8)
    first = [answer[0] for answer in sample(model, rows, [0], 4000, [(3, copy) for copy in range(4000)], sampling)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([rows.ids(0)])).logits[0, -1].double()
    probabilities = (logits / 0.7).softmax(dim=-1).numpy()
    order = np.argsort(-probabilities)
    nucleus = order[: int(np.searchsorted(probabilities[order].cumsum(), 0.8)) + 1]
    assert {*first} <= {*nucleus.tolist()}
    expected = probabilities[nucleus] / probabilities[nucleus].sum()
    found = np.array([first.count(token) for token in nucleus.tolist()]) / len(first)
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / len(first))


def plain_logps(model: Any, prompt: list[int], answer: Sequence[int], temperature: float) -> torch.Tensor:
    """Log probabilities of one answer, unpadded."""
    output = model(input_ids=torch.tensor([[*prompt, *answer]]))
    logits: torch.Tensor = output.logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("grpo", {}),
        ("grpo", {"loss_type": "grpo", "scale_rewards": "none", "beta": 0.0}),
        ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "batch"}),
        ("rloo", {}),
        ("rloo", {"scale_rewards": "batch"}),
    ],
)
def test_advantages_and_loss_are_the_papers(folder: Path, kind: str, more: dict[str, Any]) -> None:
    """Pinned to plain torch on each answer by itself, after an update that leaves some ratios outside of epsilon."""
    changes = {
        f"objective.{key}": value for key, value in {"temperature": 0.8, "iterations": 2, "beta": 0.3, **more}.items()
    }
    length = {"name": "length", "max_chars": 5, "weight": 0.5}
    spec = rl_task(folder, kind, **{**changes, "objective.rewards": [VOWEL, length], "optim.micro_batch": 4})
    setting = setting_of(spec, folder)
    moved(setting.model, 1)
    trainer, rows = build(setting).trainer, setting.job.data.train
    assert isinstance(rows, PromptRows)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    sampled = {name: parameter.data.clone() for name, parameter in trainer.model.named_parameters() if "lora_B" in name}
    moved(setting.model, 2)
    loss = trainer.compute_loss(trainer.model, batch)

    answers = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    new = [plain_logps(trainer.model, prompt, answer, 0.8) for prompt, answer in zip(prompts, answers, strict=True)]
    current = {name: parameter.data.clone() for name, parameter in trainer.model.named_parameters() if name in sampled}
    with torch.no_grad():
        with trainer.model.disable_adapter():
            reference = [plain_logps(trainer.model, *pair, 0.8) for pair in zip(prompts, answers, strict=True)]
        for name, parameter in trainer.model.named_parameters():
            parameter.data = sampled.get(name, parameter.data)
        old = [plain_logps(trainer.model, *pair, 0.8) for pair in zip(prompts, answers, strict=True)]
        for name, parameter in trainer.model.named_parameters():
            parameter.data = current.get(name, parameter.data)
    template = base_model.template(setting.base)
    texts = [template.decode(answer[:-1] if answer[-1] in template.stop_ids else answer) for answer in answers]
    rewards = torch.tensor(
        [float(any(c in "aeiou" for c in text)) - 0.5 * min(1, max(0, len(text) - 5) / 5) for text in texts]
    )
    expected = (grpo if kind == "grpo" else rloo)(spec, prompts, rewards, new, old, reference)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert abs(loss.item()) > 1e-3


def groups(prompts: list[list[int]], values: torch.Tensor) -> list[torch.Tensor]:
    """Places of the answers to each prompt: the trainer has shuffled them."""
    return [torch.tensor([place for place, prompt in enumerate(prompts) if prompt == one]) for one in unique(prompts)]


def unique(prompts: list[list[int]]) -> list[list[int]]:
    return [prompt for place, prompt in enumerate(prompts) if prompt not in prompts[:place]]


def clipped(advantage: torch.Tensor, ratio: torch.Tensor, epsilon: float) -> torch.Tensor:
    return -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def grpo(spec: Any, prompts: Any, rewards: torch.Tensor, new: Any, old: Any, reference: Any) -> torch.Tensor:
    """Shao et al. 2024, eq. 3, its KL estimate weighed by the ratio (as TRL 1.16 does); Dr. GRPO and DAPO averages."""
    objective, advantages = spec.objective, torch.zeros_like(rewards)
    for places in groups(prompts, rewards):
        spread = {"batch": rewards.std(), "none": None}.get(objective.scale_rewards, rewards[places].std())
        advantages[places] = (rewards[places] - rewards[places].mean()) / (1.0 if spread is None else spread + 1e-4)
    by_answer: list[torch.Tensor] = []
    for advantage, one, before, ref in zip(advantages, new, old, reference, strict=True):
        ratio = (one - before).exp()
        kl = ((ref - one).exp() - (ref - one) - 1) * ratio
        by_answer.append(clipped(advantage, ratio, objective.epsilon) + objective.beta * kl)
    if objective.loss_type == "grpo":
        return torch.stack([loss.mean() for loss in by_answer]).mean()
    if objective.loss_type == "dr_grpo":
        return torch.cat(by_answer).sum() / float(len(by_answer) * objective.max_new_tokens)
    return torch.cat(by_answer).mean()


def rloo(spec: Any, prompts: Any, rewards: torch.Tensor, new: Any, old: Any, reference: Any) -> torch.Tensor:
    """Ahmadian et al. 2024: the KL is in the reward, the baseline is the mean of the other answers."""
    objective = spec.objective
    kl = torch.stack([(before - ref).sum() for before, ref in zip(old, reference, strict=True)])
    worth, advantages = rewards - objective.beta * kl, torch.zeros_like(rewards)
    for places in groups(prompts, rewards):
        for place in places:
            others = worth[[other for other in places.tolist() if other != place]]
            advantages[place] = worth[place] - others.mean()
    if objective.scale_rewards == "batch":
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-4)
    ratios = torch.stack([(one.sum() - before.sum()).exp() for one, before in zip(new, old, strict=True)])
    return clipped(advantages, ratios, objective.epsilon).mean()


def run(spec: TrainSpec, name: str, stop_at: int | None = None) -> list[StepReport]:
    seen: list[StepReport] = []

    def report(step: StepReport) -> bool:
        seen.append(step)
        return step.step != stop_at

    run_steps(TrainJob(spec, prepare(spec), paths(spec, name)), report)
    return seen


def paths(spec: TrainSpec, name: str) -> RunPaths:
    return RunPaths(Store(spec.root), name, "0" * 64)


DIGITS = {"objective.rewards": [{**VOWEL, "pattern": "[0-9]"}], "optim.epochs": 4, "eval_every": 8}


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_tiny_model_learns_to_be_rewarded(folder: Path, kind: str) -> None:
    spec = rl_task(folder, kind, **DIGITS)
    steps = run(spec, f"learn-{kind}")
    first, last = (np.mean([step.metrics["reward"] for step in part]) for part in (steps[:3], steps[-3:]))
    assert first < 0.5 < 0.85 < last
    assert steps[-1].eval_loss == -steps[-1].metrics["eval_reward"] < -0.85
    assert steps[-1].metrics["rewards/regex/mean"] == steps[-1].metrics["reward"]
    assert steps[0].metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1].metrics["kl"] > 0.01
    assert 0 <= steps[-1].metrics["completions/clipped_ratio"] <= 1 <= steps[-1].metrics["completions/mean_length"] <= 6
    longest = max(prepare(spec).train.lengths_N) // 4
    assert 16 * 15 < steps[0].tokens <= 16 * longest


@pytest.fixture(scope="module")
def published(folder: Path) -> AdapterManifest:
    """An adapter that has learned something, to begin from."""
    spec = rl_task(folder, **{**DIGITS, "optim.epochs": 1})
    run(spec, "published")
    known = facts(base_digest=base_model.resolve(spec.base).digest, method=spec.adapter.model_dump(mode="json"))
    with Checkpoints(paths(spec, "published")).model_files(4) as adapter:
        return artifact.publish(Store(spec.root), spec.name, adapter, **known, alias="latest")


@pytest.mark.parametrize(("kind", "iterations"), [("grpo", 2), ("rloo", 1)])
def test_a_resumed_run_equals_the_uninterrupted_one(
    folder: Path, published: AdapterManifest, kind: str, iterations: int
) -> None:
    """Equal answers, rewards and losses, and the same reference: the adapter that it began from."""
    init = published.ref if kind == "rloo" else None
    changes = {"objective.iterations": iterations, "checkpoint_every": 2, "optim.epochs": 1, "init_from": init}
    spec, last = rl_task(folder, kind, **changes), 4 * iterations
    whole = run(spec, f"whole-{kind}")
    parts = run(spec, f"parts-{kind}", stop_at=last // 2) + run(spec, f"parts-{kind}")
    assert [step.step for step in parts] == [step.step for step in whole] == list(range(1, last + 1))
    assert whole[0].metrics["kl"] == pytest.approx(0, abs=1e-6)
    for one, other in zip(whole, parts, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-7)
        assert other.metrics == pytest.approx(one.metrics, rel=1e-6, abs=1e-7)
        assert other.tokens == one.tokens


def test_a_reward_that_fails_stops_the_run_and_names_the_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoints([EntryPoint("odd", "math:isnan", GROUP)])  # takes one argument, not an answer and a row
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))
    with pytest.raises(BadReward, match=r"reward 'odd' of row 'row\d+': it raised TypeError"):
        run(rl_task(folder, **{"objective.rewards": ["odd"]}), "odd")


def test_a_reward_model_rewards_the_whole_conversation(folder: Path, published: AdapterManifest) -> None:
    """As the published model itself scores prompt and answer; pinned to a version before anything starts."""
    pairs = pair_task(folder / "pairs", name="judge", objective={"kind": "reward"}, **{"data.eval_rows": 1})
    pairs = pairs.with_({"root": str(folder / "root"), "base": str(folder / "base")})
    run_steps(TrainJob(pairs, prepare(pairs), paths(pairs, "judge"), max_steps=2), lambda _: True)
    known = facts(
        base_digest=base_model.resolve(pairs.base).digest,
        method={**pairs.adapter.model_dump(mode="json"), "objective": "reward"},
    )
    with Checkpoints(paths(pairs, "judge")).model_files(2) as adapter:
        judge = artifact.publish(Store(pairs.root), "judge", adapter, **known, alias="latest")
    asked = {"name": "reward_model", "model": "judge@latest", "clip": [-2, 2]}
    spec = rl_task(folder, **{"objective.rewards": [asked, {"name": "json", "weight": 0.0}]})
    rows, base = prepare(spec).train, base_model.resolve(spec.base)
    assert isinstance(rows, PromptRows)
    assert rows.rewards[0].content == judge.ref
    (step, *_) = run(spec, "rlhf", stop_at=1)
    setting = setting_of(spec, folder)
    scorer, told = RewardScorer.load(rows.rewards, setting), load_scorer(spec.root, judge.ref, base, spec.quant)
    answers = [[5, 6, 7], [8]]
    values = scorer.values(0, rows, [0, 1], answers)
    assert values == pytest.approx(told([[*rows.ids(index), *answers[index]] for index in (0, 1)]), rel=1e-5)
    assert len({*values}) == 2
    assert step.metrics["rewards/reward_model/mean"] == pytest.approx(step.metrics["reward"], rel=1e-4)
    with pytest.raises(ArtifactError, match="objective.kind=sft"):
        prepare(rl_task(folder, **{"objective.rewards": [{**asked, "model": "colours@latest"}]}))


def test_each_step_has_the_plans_prompts_on_any_number_of_workers(folder: Path) -> None:
    spec = rl_task(folder, **{"data.train_rows": 3, "optim.rows_per_step": 8, "objective.iterations": 2})
    job = TrainJob(spec, prepare(spec), max_steps=6)
    for world in (1, 2, 4):
        plan = plan_of(job, world)
        asked = prompts_of(plan, 2)
        assert len(asked) == 3 * 8
        for step in range(3):
            part = asked[8 * step : 8 * step + 8]
            assert (
                sorted(one["row"] for one in part)
                == sorted(plan.rows_SR[2 * step])
                == sorted(plan.rows_SR[2 * step + 1])
            )
            assert len({(one["row"], one["again"]) for one in part}) == 8, "a prompt asked twice is answered anew"


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_two_workers_take_the_steps_of_one(folder: Path, kind: str) -> None:
    spec = rl_task(folder, kind)
    one = run(spec, f"one-{kind}")
    together = paths(spec, f"two-{kind}")
    train_on(2, {"rl": Task(TrainJob(spec, prepare(spec), together))}, folder / f"ranks-{kind}")
    two = read_steps(together)
    assert len(two) == len(one) == 4
    for alone, shared in zip(one, two, strict=True):
        assert shared.tokens == alone.tokens
        assert shared.loss == pytest.approx(alone.loss, rel=1e-4, abs=1e-5)
        assert shared.metrics == pytest.approx(alone.metrics, rel=1e-3, abs=1e-5)


def test_bad_rows_and_rewards_are_told(folder: Path) -> None:
    with pytest.raises(DataError, match=r"row 'row0': gold: missing or empty"):
        prepare(rl_task(folder, **{"objective.rewards": ["json", "field_accuracy"]}))
    with pytest.raises(DataError, match="longer than max_length=20"):
        prepare(rl_task(folder, **{"max_length": 20, "objective.max_new_tokens": 12}))
    spec = rl_task(folder, **{"max_length": 40, "objective.max_new_tokens": 30, "on_overlong": "refuse"})
    with pytest.raises(DataError, match=r"row \d+ \(id row\d+\)[\s\S]*on_overlong=refuse allows at most max_length=40"):
        prepare(spec)
