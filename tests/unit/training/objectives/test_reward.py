"""Reward models against plain torch, transformers and PEFT: what is learned, published, asked and refused."""

from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, TrainerCallback, set_seed

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.errors import ArtifactError, BaseModelError, ConfigError
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import ReadOptions
from graftwork.serving.engine.adapters.kinds import read_adapter
from graftwork.serving.engine.lora_layers import Sites
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import plan_of, run_steps
from graftwork.training.objectives.dpo import PairRows
from graftwork.training.objectives.reward_head import add_reward_head, load_scorer, rewards_of
from graftwork.training.objectives.rows import prepare
from graftwork.training.objectives.trainer import TrainerContext, build
from graftwork.training.spec import TrainSpec
from graftwork.training.warm_start import pin_init
from graftwork.training.worker_messages import StepReport, TrainJob
from tests import engines
from tests.local_endpoint import local_endpoint
from tests.training import pair_task

REWARD = {"name": "judge", "objective": {"kind": "reward", "centre": 0.01}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reward")


@pytest.fixture(scope="module")
def spec(folder: Path) -> TrainSpec:
    return pair_task(folder, **REWARD, **{"optim.epochs": 3, "optim.lr": 4e-3, "optim.micro_batch": 4})


@pytest.fixture(scope="module")
def trained(spec: TrainSpec) -> tuple[RunPaths, list[StepReport]]:
    """A run stopped on its way and gone on with, its adapter published as `judge@latest`."""
    run, seen = RunPaths(Store(spec.root), spec.name, "1" * 64), list[StepReport]()

    def see(step: StepReport) -> bool:
        seen.append(step)
        return len(seen) != 6

    job = TrainJob(spec, prepare(spec), run)
    run_steps(job, see)
    result = run_steps(job, see)
    base = base_model.resolve(spec.base)
    template = base_model.template(base)
    with Checkpoints(run).model_files(result.steps) as adapter:
        artifact.publish(
            run.store,
            spec.name,
            adapter,
            base_digest=base.digest,
            quant=spec.quant.model_dump(mode="json"),
            template_digest=template.digest,
            tokenizer_digest=template.tokenizer_digest,
            data_fingerprint="f",
            method={**spec.adapter.model_dump(mode="json"), "objective": "reward"},
            prompt={},
            metrics={},
            run=run.run_id,
            provenance={},
            alias="latest",
        )
    return run, seen


def test_the_loss_is_that_of_a_plain_classifier(folder: Path) -> None:
    """Pinned to transformers' sequence classifier over the same head, asked one conversation at a time, unpadded."""
    spec = pair_task(folder, **REWARD, **{"quant.kind": "none"})
    job, base = TrainJob(spec, prepare(spec)), base_model.resolve(spec.base)
    set_seed(0)
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    model = attach(add_reward_head(loaded.model), spec.adapter)
    trainer = build(TrainerContext(job, plan_of(job, 1), base, model, folder / "out", TrainerCallback())).trainer
    plain = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=1, dtype=torch.float32)
    plain.score.weight.data = model.base_model.model.score.modules_to_save["default"].weight.data
    plain.config.pad_token_id = 0
    rows, indices = job.data.train, [0, 1, 2, 3]
    assert isinstance(rows, PairRows)
    with torch.no_grad():
        chosen, rejected = (
            torch.stack([plain(torch.from_numpy(side.row(i)[0])[None].long()).logits[0, 0] for i in indices])
            for side in (rows.chosen, rows.rejected)
        )
    expected = (1 + (rejected - chosen).exp()).log().mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    inputs = trainer.data_collator([{"row": index} for index in indices])
    assert job.data.pad_id in {int(rows.chosen.row(i)[0][-1]) for i in indices}, "the padding token ends an answer too"
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_learns_which_answer_is_better(trained: tuple[RunPaths, list[StepReport]]) -> None:
    _, seen = trained
    assert [step.step for step in seen] == [*range(1, 7), *range(7, 16)]
    assert seen[-1].metrics["eval_accuracy"] >= 0.9 > seen[0].metrics["accuracy"]
    assert seen[-1].loss < 0.5 * seen[0].loss
    assert seen[-1].metrics["eval_margin"] > 1
    assert abs(seen[-1].metrics["eval_mean_reward"]) < 1


def test_a_published_one_scores_as_peft_does(spec: TrainSpec, trained: tuple[RunPaths, list[StepReport]]) -> None:
    run, _ = trained
    base, rows = base_model.resolve(spec.base), prepare(spec).train
    assert isinstance(rows, PairRows)
    conversations = [side.row(i)[0].tolist() for i in range(12) for side in (rows.chosen, rows.rejected)]
    rewards = load_scorer(spec.root, "judge@latest", base, spec.quant)(conversations)
    assert sum(better > worse for better, worse in zip(rewards[::2], rewards[1::2], strict=True)) >= 11
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    folder = artifact.fetch(run.store, "judge", resolve(run.store, "judge@latest").version)
    plain = PeftModel.from_pretrained(add_reward_head(loaded.model), folder).eval()
    alone = [rewards_of(plain, rows.chosen, [i], 0).item() for i in range(3)]
    assert rewards[:6:2] == pytest.approx(alone, rel=1e-4)


def test_what_is_no_reward_model_and_what_is_one_are_told_apart(
    spec: TrainSpec, trained: tuple[RunPaths, list[StepReport]]
) -> None:
    run, _ = trained
    base, manifest = base_model.resolve(spec.base), resolve(run.store, "judge@latest")
    with pytest.raises(ConfigError, match="goes on as a reward model alone"):
        pin_init(spec.with_({"objective": {"kind": "dpo"}, "init_from": "judge@latest"}), base, str)
    model = engines.load_model(base.folder)
    with pytest.raises(ArtifactError, match=r"task_type='SEQ_CLS'\n  Rule: it scores answers"):
        read_adapter(
            artifact.fetch(run.store, "judge", manifest.version),
            BaseView(model, Sites(model).shapes),
            ReadOptions(16, torch.float32),
        )
    published = artifact.adopt(
        run.store,
        manifest.model_copy(update={"task": "other", "method": {"kind": "lora"}}),
        {name: (artifact.fetch(run.store, "judge", manifest.version) / name).read_bytes() for name in manifest.files},
    )
    with pytest.raises(ArtifactError, match="trained with objective.kind=sft"):
        load_scorer(spec.root, published.ref, base, spec.quant)


def test_an_architecture_without_a_classifier_is_refused() -> None:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    config = CodeGenConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=4, rotary_dim=4, n_positions=32)
    with pytest.raises(BaseModelError, match="no sequence classifier of this architecture"):
        add_reward_head(CodeGenForCausalLM(config))


def test_an_endpoint_answers_that_it_cannot_be_asked(
    spec: TrainSpec, trained: tuple[RunPaths, list[StepReport]]
) -> None:
    serving = ServeSpec.model_validate(
        {
            "base": spec.base.uri,
            "root": spec.root,
            "quant": {"kind": "none"},
            "engine": {"max_seq_len": 256, "num_threads": 1},
        }
    )
    with local_endpoint(serving) as url:
        (name,) = [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"] if "judge@latest" in one["id"]]
        asked = {"model": name, "messages": [{"role": "user", "content": "Name colour 1"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
    assert "it scores answers" in answer.json()["error"]["message"]
