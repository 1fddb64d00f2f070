"""Every kind of adapter: it learns, goes on after its death, is served as it was trained, and leaves the base whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from graftwork import config
from graftwork.artifacts import publish as artifact
from graftwork.artifacts import registry, verify
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.base import publish as base_publish
from graftwork.base.source import BaseSpec
from graftwork.errors import ConfigError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import adapter_disabled, attach, attach_frozen_adapter, load_adapter_weights
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.run import PublishedModel, ResolvedRun, publish, run_paths
from graftwork.training.spec import TrainSpec
from graftwork.training.warm_start import parent_of
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob, read_steps
from tests import engines
from tests.adapters import facts
from tests.training import task

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 4}},
    "rslora": {"adapter": {"rank": 4, "alpha": 8, "rslora": True}},
    "dora": {"adapter": {"rank": 4, "dora": True}},
    "names": {"adapter": {"rank": 4, "target_modules": ["q_proj", "mlp.up_proj"]}, "optim.lr": 0.02},
    "regex": {"adapter": {"rank": 4, "target_modules": r".*\.1\.self_attn\.(q|v)_proj"}, "optim.lr": 0.05},
    "saved": {"adapter": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "ia3": {"adapter": {"kind": "ia3"}, "optim.lr": 0.05},
    "prefix": {"adapter": {"kind": "prefix", "tokens": 8}, "optim.lr": 0.1},
    "pfeiffer": {"adapter": {"kind": "bottleneck", "size": 8}, "optim.lr": 0.02},
    "houlsby": {
        "adapter": {"kind": "bottleneck", "placement": "houlsby", "size": 8, "activation": "silu"},
        "optim.lr": 0.02,
    },
    "full": {"adapter": {"kind": "full"}, "optim.lr": 1e-3},
}
ADAPTERS = [kind for kind in KINDS if kind != "full"]
ROOT = Path(__file__).parents[4]
PROMPTS = ([1, 40, 41, 42], [1, 300, 12, 13, 14, 15, 99])


class Killed(Exception):
    """Stands for the death of the process."""


def spec_of(folder: Path, kind: str, **more: Any) -> TrainSpec:
    return task(folder, **{"quant.kind": "none", "optim.epochs": 3, "optim.micro_batch": 8, **KINDS[kind], **more})


def run_of(spec: TrainSpec, name: str) -> RunPaths:
    return RunPaths(Store(spec.root), name, "0" * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, tuple[TrainSpec, LoopResult, Path]]:
    """Each kind after 18 steps: its spec, its curve, a folder with its published form."""
    done = {}
    for kind in ADAPTERS:
        spec = spec_of(folder, kind)
        run = run_of(spec, kind)
        result = run_steps(TrainJob(spec, prepare(spec), run), lambda _: True)
        with Checkpoints(run).model_files(result.steps) as made:
            files = verify.read_folder(made)
        published = folder / "published" / kind
        published.mkdir(parents=True)
        for name, data in files.items():
            (published / name).write_bytes(data)
        done[kind] = spec, result, published
    return done


def with_adapter(spec: TrainSpec, published: Path) -> Any:
    """The base with the published weights, as training holds it."""
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    model = attach(loaded.model, spec.adapter)
    load_adapter_weights(model, published)
    return model.eval()


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], new_tokens: int = 12) -> list[int]:
    ids = torch.tensor([list(prompt)])
    for _ in range(new_tokens):
        logits_1TV = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits_1TV[:, -1:].argmax(-1)], dim=1)
    answer: list[int] = ids[0, len(prompt) :].tolist()
    return answer


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_learns(trained: dict[str, tuple[TrainSpec, LoopResult, Path]], kind: str) -> None:
    _, result, _ = trained[kind]
    first, last = result.train_loss[0][1], result.train_loss[-1][1]
    assert last < first - 1, f"{kind}: {first:.3f} -> {last:.3f} nats"
    assert result.eval_loss[-1][1] < first - 1


def test_the_endpoint_says_what_the_trained_model_says(
    trained: dict[str, tuple[TrainSpec, LoopResult, Path]], folder: Path
) -> None:
    engine = NativeEngine(engines.load_model(folder / "base"), engines.spec(), "cpu")
    engine.start()
    try:
        for kind, (_, _, published) in trained.items():
            engine.load_adapter(kind, published)
        asked = [(kind, n) for kind in trained for n in range(len(PROMPTS))]
        answers = engines.ask(
            engine, *(engines.request(f"{kind}{n}", PROMPTS[n], kind, max_new_tokens=12) for kind, n in asked)
        )
    finally:
        engine.stop()
    said: dict[str, list[list[int]]] = {}
    for (kind, _), answer in zip(asked, answers, strict=True):
        said.setdefault(kind, []).append(answer.tokens)
    unlike_base = [greedy(engines.load_model(folder / "base"), prompt) for prompt in PROMPTS]
    for kind, (spec, _, published) in trained.items():
        model = with_adapter(spec, published)
        expected = [greedy(model, prompt) for prompt in PROMPTS]
        assert said[kind] == expected, kind
        assert expected != unlike_base, f"{kind} changes nothing"
        with adapter_disabled(model):
            assert [greedy(model, prompt) for prompt in PROMPTS] == unlike_base, f"{kind} off is the base"
        assert [greedy(model, prompt) for prompt in PROMPTS] == expected, f"{kind} is on again"


@pytest.mark.parametrize("kind", ["prefix", "houlsby", "full"])
def test_killed_it_goes_on_to_the_same_curve(
    folder: Path,
    trained: dict[str, tuple[TrainSpec, LoopResult, Path]],
    full: tuple[ResolvedRun, LoopResult, PublishedModel],
    kind: str,
) -> None:
    spec, whole = (full[0].spec, full[1]) if kind == "full" else trained[kind][:2]
    job = TrainJob(spec, prepare(spec), run_of(spec, f"killed-{kind}"))

    def dies(step: StepReport) -> bool:
        if step.step == 10:
            raise Killed
        return True

    with pytest.raises(Killed):
        run_steps(job, dies)
    assert run_steps(job, lambda _: True).train_loss == whole.train_loss


@pytest.mark.parametrize(
    ("kind", "quant"), [("pfeiffer", "nf4"), ("pfeiffer", "int8"), ("ia3", "int8"), ("prefix", "nf4")]
)
def test_it_learns_on_a_quantised_base(folder: Path, kind: str, quant: str) -> None:
    spec = spec_of(folder, kind, **{"quant.kind": quant})
    result = run_steps(TrainJob(spec, prepare(spec), max_steps=6), lambda _: True)
    assert result.train_loss[-1][1] < result.train_loss[0][1]


@pytest.mark.parametrize("kind", ["dora", "prefix", "houlsby"])
def test_training_goes_on_from_a_published_one(
    folder: Path, trained: dict[str, tuple[TrainSpec, LoopResult, Path]], kind: str
) -> None:
    spec, whole, published = trained[kind]
    known = facts(base_digest=base_model.resolve(spec.base).digest, method=spec.adapter.model_dump(mode="json"))
    artifact.publish(Store(spec.root), kind, published, **known, alias="latest")
    run = ResolvedRun.resolve(spec.with_({"init_from": f"{kind}@latest"}))
    going_on = run_steps(TrainJob(run.spec, run.data, max_steps=1), lambda _: True)
    assert going_on.train_loss[0][1] < whole.train_loss[0][1] - 0.8
    assert run.spec.init_from is not None
    assert parent_of(run.spec) == run.spec.init_from, "another task's version is named whole"


def test_going_on_with_another_shape_is_refused(
    folder: Path, trained: dict[str, tuple[TrainSpec, LoopResult, Path]]
) -> None:
    spec, _, published = trained["houlsby"]
    known = facts(base_digest=base_model.resolve(spec.base).digest, method=spec.adapter.model_dump(mode="json"))
    artifact.publish(Store(spec.root), "shape", published, **known, alias="latest")
    with pytest.raises(ConfigError, match=r"adapter\.placement=pfeiffer"):
        run_paths(spec.with_({"init_from": "shape@latest", "adapter.placement": "pfeiffer"}))


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_an_adapter_on_top_of_another_is_published_as_their_sum(
    folder: Path, trained: dict[str, tuple[TrainSpec, LoopResult, Path]], quant: str
) -> None:
    first, whole, below = trained["rslora"]
    known = facts(base_digest=base_model.resolve(first.base).digest, method=first.adapter.model_dump(mode="json"))
    ref = artifact.publish(Store(first.root), "language", below, **known, alias="latest").ref
    spec = spec_of(folder, "lora", **{"quant.kind": quant, "base_adapter": "language@latest", "optim.epochs": 1})
    run = ResolvedRun.resolve(spec)
    assert run.spec.base_adapter == ref
    assert run.paths.digest != run_paths(spec.with_({"base_adapter": None})).digest
    result = run_steps(TrainJob(run.spec, run.data, run.paths), lambda _: True)
    assert result.train_loss[0][1] < whole.train_loss[-1][1] + 0.8, "it begins where the one below ended"
    run.paths.store.write_json({"seed": 0}, *run.paths.provenance())
    made = publish(run, result, read_steps(run.paths))
    manifest = resolve(run.paths.store, made.adapter or "")
    assert (manifest.method["rank"], manifest.merged_from) == (8, (ref,))
    assert registry.tree(run.paths.store, manifest)["made"].endswith(f"on top of {ref}")
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    served = PeftModel.from_pretrained(loaded.model, artifact.fetch(run.paths.store, "colours", made.version)).eval()
    again = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    attach_frozen_adapter(again.model, below)
    stacked = attach(again.model, spec.adapter)
    with Checkpoints(run.paths).model_files(result.steps) as top:
        load_adapter_weights(stacked, top)
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        expected = stacked.eval()(input_ids=ids).logits
        torch.testing.assert_close(served(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_bottleneck_begins_as_the_base(folder: Path) -> None:
    spec = spec_of(folder, "houlsby")
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    ids = torch.tensor([PROMPTS[0]])
    before = loaded.model(input_ids=ids).logits
    model = attach(loaded.model, spec.adapter)
    assert torch.equal(model(input_ids=ids).logits, before)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 2 * 4, "weights and biases of down and up, behind two linears of two blocks"


def test_saved_names_are_those_of_the_serving_engine(trained: dict[str, tuple[TrainSpec, LoopResult, Path]]) -> None:
    _, _, published = trained["pfeiffer"]
    tensors = load_file(published / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.{}.mlp.down_proj.bottleneck_{}"
    assert set(tensors) == {
        stem.format(layer, part) for layer in (0, 1) for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    }


@pytest.fixture(scope="module")
def full(folder: Path) -> tuple[ResolvedRun, LoopResult, PublishedModel]:
    """All weights trained and published."""
    spec = spec_of(folder, "full")
    run = ResolvedRun.resolve(spec)
    result = run_steps(TrainJob(run.spec, run.data, run.paths), lambda _: True)
    run.paths.store.write_json({"seed": 0}, *run.paths.provenance())
    return run, result, publish(run, result, read_steps(run.paths))


def test_all_weights_learn_and_become_a_base(
    full: tuple[ResolvedRun, LoopResult, PublishedModel], folder: Path
) -> None:
    run, result, made = full
    assert result.train_loss[-1][1] < result.train_loss[0][1] - 1
    assert (made.adapter, made.base) == (None, str(folder / "root" / "bases" / "colours" / made.version))
    found = base_publish.find(run.paths.store, "colours", made.version)
    assert found is not None
    assert found.parent_digest == run.base.digest
    base = base_model.resolve(BaseSpec(uri=made.base or ""))
    assert base.digest == found.digest
    assert base_model.template(base).digest == base_model.template(run.base).digest
    assert publish(run, result, read_steps(run.paths)) == made, "again is the same"


def test_a_published_base_is_served_and_trained_on(
    full: tuple[ResolvedRun, LoopResult, PublishedModel], folder: Path
) -> None:
    run, result, made = full
    spec = task(folder, **{"base": made.base, "quant.kind": "none"})
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="serve")
    engine = NativeEngine(loaded.model, engines.spec(), "cpu")
    engine.start()
    try:
        said = engines.ask(engine, *(engines.request(str(n), p, max_new_tokens=12) for n, p in enumerate(PROMPTS)))
    finally:
        engine.stop()
    trained = engines.load_model(folder / "base")
    with Checkpoints(run.paths).model_files(result.steps) as weights:
        trained.load_state_dict(load_file(weights / "model.safetensors"), strict=False)
    assert [answer.tokens for answer in said] == [greedy(trained, prompt) for prompt in PROMPTS]
    going_on = run_steps(TrainJob(spec, prepare(spec), max_steps=1), lambda _: True)
    assert going_on.train_loss[0][1] < result.train_loss[0][1] - 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"kind": "full"}, "quant.kind": "nf4"}, r"quant.kind=nf4 can't go .*QLoRA"),
        ({"adapter": {"kind": "full"}, "init_from": "colours@latest"}, "Set base to the base to go on from"),
        ({"adapter": {"kind": "full"}, "alias": "prod"}, "alias=prod can't take effect"),
        ({"adapter": {"kind": "ia3"}, "base_adapter": "language@latest"}, "only a LoRA without DoRA adds to one"),
        ({"base_adapter": "language@latest", "init_from": "language@latest"}, "Give one of them"),
        ({"base_adapter": "colours@latest"}, "Set init_from to continue it"),
        ({"adapter": {"kind": "prefix"}, "optim.gradient_checkpointing": True}, "smaller optim.micro_batch"),
    ],
)
def test_what_cannot_go_together_is_refused_with_what_can(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        task(folder, **{"quant.kind": "none", **changes})


def test_a_key_of_another_kind_is_told_so(folder: Path) -> None:
    asked = task(folder).model_dump(mode="json", exclude_unset=True)
    with pytest.raises(ConfigError, match="known keys here: kind, tokens") as caught:
        config.validate(TrainSpec, {**asked, "adapter": {"kind": "prefix", "rank": 4}}, where="spec")
    assert "replace all of them: --set 'adapter={kind: prefix}'" in caught.value.hint


def test_every_kind_has_an_example() -> None:
    kinds = set()
    for path in sorted((ROOT / "examples" / "train-adapters").glob("*.yaml")):
        spec = config.load(path, expect="train")
        assert isinstance(spec, TrainSpec)
        assert spec.name == f"airport-card-{path.stem}"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
        kinds.add(path.stem)
    loras = {"lora", "names", "regex", "saved"}
    assert kinds == KINDS.keys() - loras, "LoRA's is examples/train-airport-card.yaml"


def test_all_weights_need_a_learning_rate_of_their_own(folder: Path) -> None:
    asked = {**task(folder).model_dump(mode="json", exclude_unset=True), "quant": {"kind": "none"}}
    with pytest.raises(ConfigError, match="1e-5 to 5e-5"):
        config.validate(TrainSpec, {**asked, "optim": {}, "adapter": {"kind": "full"}}, where="spec")


def test_all_weights_leave_no_base_to_turn_back_to(folder: Path) -> None:
    task(folder)
    model = engines.load_model(folder / "base")
    with pytest.raises(ConfigError, match="adapter.kind=full"), adapter_disabled(model):
        pass
