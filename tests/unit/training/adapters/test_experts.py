"""LoRA on bases with experts, from training to the endpoint: what is trained, published, continued and served."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from graftwork.adapters.experts import adaptable_linears
from graftwork.adapters.lora import LoraSpec
from graftwork.artifacts import verify
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.errors import ArtifactError, ConfigError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import RunPaths, Store
from graftwork.training.adapters.attach import attach, load_adapter_weights
from graftwork.training.adapters.merge import MergeSource
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob
from tests import engines
from tests.families import config_of, write_family
from tests.training import task, write_rows

CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"rank": 4},
    "olmoe": {"rank": 4, "router": True},
    "qwen3_moe": {"rank": 4, "experts": True},
    "glm4_moe": {"rank": 4, "experts": True},
    "deepseek_v3": {"rank": 4, "dropout": 0.1},
}
"""`adapter` by family: attention alone, with routers, experts, shared experts too, dropout on shared experts."""
PROMPT = [1, 40, 41, 42, 300, 12]


def spec_of(folder: Path, kind: str, adapter: dict[str, Any], **keys: Any) -> TrainSpec:
    if not (folder / "base").exists():
        write_family(folder / "base", kind)
        write_rows(folder / "train.jsonl", 16)
        write_rows(folder / "eval.jsonl", 4, first=1000)
    fixed = {"quant.kind": "none", "optim.epochs": 2, "optim.rows_per_step": 8, "optim.micro_batch": 4}
    return task(folder, **{**fixed, "adapter": adapter, **keys})


def trained(spec: TrainSpec, folder: Path) -> tuple[LoopResult, Path]:
    """The result of a run, and a folder with its published form."""
    run = RunPaths(Store(spec.root), "run", "0" * 64)
    result = run_steps(TrainJob(spec, prepare(spec), run), lambda _: True)
    with Checkpoints(run).model_files(result.steps) as made:
        files = verify.read_folder(made)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return result, folder


@pytest.mark.parametrize("kind", CASES)
def test_what_is_trained_is_served_as_peft_reads_it(kind: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, kind, CASES[kind])
    result, published = trained(spec, tmp_path / "published")
    assert result.train_loss[-1][1] < result.train_loss[0][1]
    tensors = load_file(published / "adapter_model.safetensors")
    assert any(".gate.lora" in name for name in tensors) is spec.adapter.router  # type: ignore[union-attr]
    on_experts = [name for name in tensors if ".experts." in name]
    assert bool(on_experts) is spec.adapter.experts  # type: ignore[union-attr]
    assert all(tensors[name].any() for name in tensors if "lora_B" in name), "a part of the adapter was not trained"
    engine = NativeEngine(engines.load_model(tmp_path / "base"), engines.spec(), "cpu")
    engine.load_adapter("v", published)
    engine.start()
    [answer] = engines.ask(engine, engines.request("r", PROMPT, "v", max_new_tokens=12))
    engine.stop()
    [expected] = engines.peft_greedy(tmp_path / "base", published, [PROMPT], 12)
    assert answer.tokens == expected
    assert expected != engines.peft_greedy(tmp_path / "base", None, [PROMPT], 12)[0]


def test_training_goes_on_from_a_published_adapter_of_experts(tmp_path: Path) -> None:
    """Its weights are all there, of shared experts too; the logits are those of PEFT's own reading."""
    from peft import PeftModel

    spec = spec_of(tmp_path, "glm4_moe", CASES["glm4_moe"])
    _, published = trained(spec, tmp_path / "published")
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    model = attach(loaded.model, spec.adapter)
    load_adapter_weights(model, published)
    reference = PeftModel.from_pretrained(engines.load_model(tmp_path / "base"), published).eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=ids).logits, reference(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe", "gpt_oss"])
def test_the_plan_counts_what_peft_trains(kind: str, tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", kind)
    shape = ModelShape.from_config(config_of(kind))
    for keys in ({}, {"experts": True}, {"router": True}, {"targets": "attention", "experts": True, "router": True}):
        adapter = LoraSpec.model_validate({"rank": 3, **keys})
        attached = attach(engines.load_model(base), adapter)
        trained = sum(one.numel() for one in attached.parameters() if one.requires_grad)
        assert adapter.trained_params(shape) == trained, keys


def test_a_base_keeps_its_experts_and_routers(tmp_path: Path) -> None:
    """Only the adapter's own tensors have gradients, and the default leaves the experts alone."""
    spec = spec_of(tmp_path, "qwen3_moe", {"rank": 2})
    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    names = [name for name, one in attach(loaded.model, spec.adapter).named_parameters() if one.requires_grad]
    assert names
    assert all(".self_attn." in name and "lora_" in name for name in names)


@pytest.mark.parametrize("kind", ["phimoe", "llama4_text"])
def test_a_router_that_is_a_linear_layer_gets_no_adapter(kind: str, tmp_path: Path) -> None:
    model = engines.load_model(write_family(tmp_path / "base", kind))
    routers = [name for name, _ in model.named_modules() if name.endswith(".router")]
    assert routers
    assert not set(routers) & set(adaptable_linears(model))
    attached = attach(model, LoraSpec(rank=2))
    assert not any("router" in name for name, one in attached.named_parameters() if one.requires_grad)


def test_gradient_checkpointing_leaves_the_losses_as_they_are(tmp_path: Path) -> None:
    losses = []
    for again in (False, True):
        keys = {"optim.gradient_checkpointing": again, "optim.epochs": 1}
        spec = spec_of(tmp_path, "qwen3_moe", CASES["qwen3_moe"], **keys)
        losses.append(run_steps(TrainJob(spec, prepare(spec)), lambda _: True).train_loss)
    for (step, one), (same, other) in zip(*losses, strict=True):
        assert step == same
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(("key", "value"), [("dropout", 0.1), ("dora", True)])
def test_what_peft_cannot_do_with_experts_is_refused_by_the_spec(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"{key} cannot take effect with experts=true"):
        LoraSpec(experts=True, **{key: value})


def test_dora_on_shared_experts_and_experts_of_a_dense_base_are_refused(tmp_path: Path) -> None:
    shared = engines.load_model(write_family(tmp_path / "shared", "glm4_moe"))
    with pytest.raises(ConfigError, match=r"adapter.dora=true(.|\n)*set adapter.targets=attention"):
        LoraSpec(dora=True).peft_config(shared)
    dense = engines.load_model(write_family(tmp_path / "dense", "llama"))
    for key in ("experts", "router"):
        with pytest.raises(ConfigError, match=rf"adapter.{key}=true(.|\n)*no experts(.|\n)*leave adapter.{key} out"):
            LoraSpec.model_validate({key: True}).peft_config(dense)
    mixtral = engines.load_model(write_family(tmp_path / "mixtral", "mixtral"))
    with pytest.raises(ConfigError, match=r"adapter.targets=mlp(.|\n)*experts and routers"):
        LoraSpec(targets="mlp").peft_config(mixtral)


def test_adapters_of_experts_are_not_merged(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "mixtral")
    config = LoraSpec(rank=2, experts=True).peft_config(engines.load_model(base))
    folder = engines.write_peft(base, tmp_path / "adapter", 1, config)
    with pytest.raises(ArtifactError, match="target_parameters"):
        MergeSource.read("a@1", folder)


def test_a_spec_without_experts_keeps_its_identity(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "mixtral", {"rank": 4})
    assert "experts" not in json.dumps(spec.recipe())
    assert "router" not in json.dumps(spec.recipe())
    assert spec.with_({"adapter.experts": True}).recipe() != spec.recipe()
