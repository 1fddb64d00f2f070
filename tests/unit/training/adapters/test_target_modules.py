"""`target_modules` and `modules_to_save`: PEFT's choice of layers, planned sizes, served weights, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import LlamaForCausalLM

from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.base.support import check_training
from graftwork.errors import ConfigError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach, load_adapter_weights
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests import engines
from tests.training import task

CHOICES: list[list[str] | str] = [
    ["q_proj", "v_proj"],
    ["self_attn.o_proj", "down_proj", "model.layers.1.mlp.gate_proj"],
    r".*\.0\.(self_attn\.(q|k)|mlp\.up)_proj",
    r"model\.layers\.\d+\.mlp\.(gate|down)_proj",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task on a base whose head is a matrix of its own."""
    folder = tmp_path_factory.mktemp("targets")
    task(folder)
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    config = model.config.to_dict() | {"tie_word_embeddings": False}
    torch.manual_seed(3)
    untied = LlamaForCausalLM(type(model.config)(**config))
    untied.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    untied.save_pretrained(folder / "base")
    return folder


def spec_of(folder: Path, **changes: Any) -> TrainSpec:
    return task(folder, **{"quant.kind": "none", "num_workers": 1, "adapter.rank": 4, **changes})


def load(spec: TrainSpec) -> Any:
    return base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train").model


def adapted(model: Any) -> set[str]:
    return {
        name for name, module in model.get_base_model().named_modules() if "default" in getattr(module, "lora_A", ())
    }


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_layers_are_those_that_peft_chooses(folder: Path, choice: list[str] | str) -> None:
    spec = spec_of(folder, **{"adapter.target_modules": choice})
    ours = attach(load(spec), spec.adapter)
    theirs = get_peft_model(load(spec), LoraConfig(r=4, target_modules=choice))
    assert adapted(ours) == adapted(theirs)
    if isinstance(choice, list):
        assert ours.active_peft_config.target_modules == set(choice), "the file has the names as they were given"


@pytest.mark.parametrize("saved", [[], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
@pytest.mark.parametrize("choice", [*CHOICES, "all-linear"], ids=str)
def test_a_plan_counts_the_trained_values(folder: Path, choice: list[str] | str, saved: list[str]) -> None:
    spec = spec_of(folder, **{"adapter.target_modules": choice, "adapter.modules_to_save": saved})
    model = attach(load(spec), spec.adapter)
    shape = ModelShape.from_config(base_model.resolve(spec.base).config)
    assert spec.adapter.trained_params(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_head_that_is_saved_whole_is_served(folder: Path) -> None:
    keys = {"adapter.target_modules": ["q_proj"], "adapter.modules_to_save": ["lm_head"], "optim.epochs": 1}
    spec = spec_of(folder, **keys)
    run = RunPaths(Store(spec.root), "saved", "0" * 64)
    result = run_steps(TrainJob(spec, prepare(spec), run), lambda _: True)
    assert result.train_loss[-1][1] < result.train_loss[0][1]
    published = folder / "published"
    with Checkpoints(run).model_files(result.steps) as made:
        published.mkdir()
        for file in made.iterdir():
            (published / file.name).write_bytes(file.read_bytes())
    model = attach(load(spec), spec.adapter)
    load_adapter_weights(model, published)
    prompt = [1, 40, 41, 42]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model.eval()(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    engine = NativeEngine(engines.load_model(folder / "base"), engines.spec(), "cpu")
    engine.start()
    try:
        engine.load_adapter("saved", published)
        (with_head,) = engines.ask(engine, engines.request("a", prompt, "saved", max_new_tokens=8))
        (base,) = engines.ask(engine, engines.request("b", prompt, None, max_new_tokens=8))
    finally:
        engine.stop()
    assert with_head.tokens == ids[0, len(prompt) :].tolist() != base.tokens


@pytest.mark.parametrize(
    ("choice", "problem", "hint"),
    [
        (["q_porj"], "no linear layer has such a name", "did you mean q_proj"),
        (["q_proj", "query"], "no linear layer has such a name", ""),
        (r".*\.7\.q_proj", "no linear layer has such a name", ""),
        (["proj"], "no linear layer has such a name", "did you mean"),
    ],
)
def test_a_name_of_no_layer_is_an_error_with_the_nearest(
    folder: Path, choice: list[str] | str, problem: str, hint: str
) -> None:
    """Before anything is loaded, from the config of the base alone, and again where the adapter is attached."""
    spec = spec_of(folder, **{"adapter.target_modules": choice})
    for check in (
        lambda: check_training(spec, base_model.resolve(spec.base).config),
        lambda: attach(load(spec), spec.adapter),
    ):
        with pytest.raises(ConfigError) as error:
            check()
        assert error.value.subject == f"adapter.target_modules={choice if isinstance(choice, str) else choice[-1]}"
        assert error.value.problem == problem
        assert "q_proj" in error.value.rule
        assert error.value.hint.startswith(hint)


def test_the_head_gets_no_adapter(folder: Path) -> None:
    spec = spec_of(folder, **{"adapter.target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ConfigError, match="it gets no adapter"):
        attach(load(spec), spec.adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.target_modules": ["q_proj"], "adapter.targets": "mlp"}, "targets=mlp cannot take effect"),
        ({"adapter.target_modules": []}, "names are given"),
        ({"adapter.target_modules": ["q_proj", "q_proj"]}, "each of them once"),
        ({"adapter.target_modules": "q_proj("}, "is no regular expression"),
        ({"adapter.modules_to_save": ["norm"]}, "embed_tokens"),
        ({"adapter.modules_to_save": ["lm_head"], "objective": {"kind": "orpo"}}, "Set objective.kind=sft or cpt"),
        ({"adapter.modules_to_save": ["lm_head"], "strategy.kind": "zero2"}, "Set strategy.kind=ddp"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError)) as error:
        spec_of(folder, **changes)
    assert message in str(error.value)


def test_a_spec_without_the_keys_keeps_its_identity(folder: Path) -> None:
    assert not {"target_modules", "modules_to_save"} & spec_of(folder).recipe()["adapter"].keys()
    named = spec_of(folder, **{"adapter.target_modules": ["q_proj"]}).recipe()["adapter"]
    assert json.loads(json.dumps(named))["target_modules"] == ["q_proj"]
