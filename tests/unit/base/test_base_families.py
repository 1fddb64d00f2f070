"""Families of transformers through the real stages, against the committed matrix; the scaled-down copy of a base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from graftwork.base.load import load, read_config, resolve
from graftwork.base.scaled import scale_down, write_scaled_base
from graftwork.base.source import BaseSpec
from graftwork.base.support import STAGES, base_support, check_serving
from graftwork.cli import app
from graftwork.errors import BaseModelError
from graftwork.quantization import QuantSpec
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.spec import ServeSpec
from graftwork.stages.base_check import StageStatus, check_base
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests import engines
from tests.base_matrix import CORE, FAMILIES, PAGE, config_of, page, results
from tests.ranks import Task, train_on

CHECKS = results()
CASES = [name if name in CORE else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
UNSERVED = [name for name, check in CHECKS.items() if check["stages"]["serve"]["status"] == "rejected"]


@pytest.mark.parametrize("family", CASES)
def test_a_family_is_supported_as_the_matrix_says(family: str) -> None:
    """Two training steps, publish and engine on a scaled-down copy, its tokens against transformers and PEFT."""
    assert check_base(config_of(family)).as_dict() == CHECKS[family], "python -m tests.base_matrix --write FAMILY"


def test_the_page_shows_the_committed_matrix() -> None:
    assert [*CHECKS] == [*FAMILIES]
    assert PAGE.read_text(encoding="utf-8") == page(CHECKS), "python -m tests.base_matrix --write"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_that_fails_is_rejected_by_the_config_alone(family: str) -> None:
    """No stage of the matrix failed while it ran: what does not work is refused before compute is spent."""
    stages = CHECKS[family]["stages"]
    assert [*stages] == [*STAGES]
    for stage, found in stages.items():
        assert "on the scaled-down base" not in found["reason"], stage
        assert bool(found["reason"]) or found["status"] == "supported", stage


@pytest.mark.parametrize(
    "family", [name if name == "Falcon H1" else pytest.param(name, marks=pytest.mark.long) for name in UNSERVED]
)
def test_the_engine_refuses_what_the_matrix_rejects(family: str, tmp_path: Path) -> None:
    base = resolve(BaseSpec(uri=str(write_scaled_base(config_of(family), tmp_path))))
    assert base_support(base.config).stages["serve"].reason
    with pytest.raises(BaseModelError, match="serving of"):
        check_serving(ServeSpec.model_validate({"base": str(base.folder), "quant": {"kind": "none"}}))
    model = load(base, QuantSpec(kind="none", dtype="float32"), device="cpu", purpose="serve").model
    with pytest.raises(BaseModelError):  # nor does the engine start where nobody checked
        NativeEngine(model, engines.spec(), "cpu")


@pytest.mark.long
@pytest.mark.parametrize("adapter", [{"rank": 4}, {"kind": "full"}], ids=["lora", "full"])
def test_a_base_with_a_tower_trains_on_two_workers_as_on_one(adapter: dict[str, Any], tmp_path: Path) -> None:
    """DDP waits for a gradient of every trained weight, and text gives none to the tower."""
    base, rows = write_scaled_base(config_of("Gemma 3 4B"), tmp_path / "base"), tmp_path / "rows.jsonl"
    texts = [
        {"prompt": f"Code {code}?", "completion": f"{code} is large."} for code in ("ZPPP", "KJFK", "EDDF", "LFPG")
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    losses = []
    for world in (1, 2):
        spec = TrainSpec.model_validate(
            {
                "name": "t",
                "root": str(tmp_path / f"root-{world}"),
                "base": str(base),
                "data": {"train": str(rows)},
                "num_workers": world,
                "gpus_per_worker": 0,
                "quant": {"kind": "none", "dtype": "float32"},
                "adapter": adapter,
                "optim": {"rows_per_step": 4, "micro_batch": 1, "lr": 1e-3},
            }
        )
        job = TrainJob(spec, prepare(spec), max_steps=3)
        losses.append(train_on(world, {"run": Task(job)}, tmp_path / f"ranks-{world}")["run"].losses)
    assert losses[0][2] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


QWEN = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "attention_dropout": 0.1,
    "dtype": "bfloat16",
}


def test_a_copy_keeps_the_structure_and_drops_the_size() -> None:
    small = scale_down(QWEN)
    assert small["num_key_value_heads"] < small["num_attention_heads"]
    assert (small["hidden_size"], small["head_dim"], small["num_hidden_layers"], small["vocab_size"]) == (
        64,
        16,
        2,
        512,
    )
    assert small["max_position_embeddings"] == 40960
    assert small["attention_dropout"] == 0.0
    assert "dtype" not in small
    assert scale_down({**QWEN, "num_key_value_heads": 32})["num_key_value_heads"] == small["num_attention_heads"]
    assert scale_down({**QWEN, "num_key_value_heads": 1})["num_key_value_heads"] == 1


def test_a_copy_has_one_layer_of_each_kind() -> None:
    layers = {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"],
        "first_k_dense_replace": 1,
        "mlp_only_layers": [3],
    }
    small = scale_down({**QWEN, **layers})
    assert small["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    assert small["first_k_dense_replace"] == 1
    assert small["mlp_only_layers"] == [2]


def test_a_copy_of_gpt_j_turns_as_many_values_as_a_head_has(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gptj").to_dict()
    assert scale_down(config)["rotary_dim"] == 16
    base = resolve(BaseSpec(uri=str(write_scaled_base(config, tmp_path))))
    model = load(base, QuantSpec(kind="none"), device="cpu", purpose="serve").model
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 512)


def test_a_copy_that_does_not_run_is_untested() -> None:
    """Of a recurrent base whose sizes do not fit the scaled-down ones: what the config alone rejects stays so."""
    found = check_base(AutoConfig.for_model("kimi_linear").to_dict()).stages
    assert found["train LoRA"].status == "untested"
    assert "no scaled-down base could be made and run" in found["train LoRA"].reason
    assert found["serve"].status == "rejected"


def test_base_check_reads_a_config_alone_and_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN), encoding="utf-8")
    assert read_config(BaseSpec(uri=str(file))) == read_config(BaseSpec(uri=str(tmp_path))) == QWEN
    done = CliRunner().invoke(app, ["base", "check", str(file), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["model_type"], found["model_class"]) == ("qwen3", "Qwen3ForCausalLM")
    assert found["stages"] == {stage: {"status": "supported", "reason": ""} for stage in STAGES}


def test_a_quantised_base_has_a_row_for_its_own_form(tmp_path: Path) -> None:
    """Plain bases have none: `checkpoint` is no value that their specs could have."""
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stages = check_base({**QWEN, "quantization_config": settings}).stages
    assert [*stages] == [*STAGES[:4], "checkpoint", *STAGES[4:]]
    assert stages["checkpoint"] == StageStatus(
        "untested", "the copy's weights are plain: `graftwork quantize` measures it"
    )
    rest = {stage: one for stage, one in stages.items() if stage != "checkpoint"}
    assert rest == dict.fromkeys(STAGES, StageStatus("supported"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "cannot be read"), ("[]", "no model_type"), ('{"model_type": "no_such_family"}', "cannot build it")],
)
def test_base_check_names_a_config_that_is_none(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(content, encoding="utf-8")
    done = CliRunner().invoke(app, ["base", "check", str(file)])
    assert isinstance(done.exception, BaseModelError)
    assert problem in done.exception.problem
