"""Every stage refuses a base that it does not support before a Ray starts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoConfig

from graftwork.base.support import STAGES, Stage, base_support, check_serving, check_training
from graftwork.cli.config import check as config_check
from graftwork.config import Spec
from graftwork.errors import BaseModelError
from graftwork.serving.deploy import check_spec
from graftwork.serving.evaluation.run import run_compare
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.quantize.run import run_quantize
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import ServeSpec
from graftwork.stages.plans import plan_spec
from graftwork.training.spec import TrainSpec
from graftwork.tuning.run import check as check_sweep
from graftwork.tuning.spec import TuneSpec
from tests.families import config_of, write_family

ROW = {"prompt": "Which airport has the code ZPPP?", "completion": "Kunming.", "id": "1", "gold": {"name": "Kunming"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    return {
        kind: str(write_family(root / kind, kind))
        for kind in ("mixtral", "falcon_h1", "gemma3", "gpt2", "qwen3", "llama4_text")
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({**ROW, "id": str(n)}) + "\n" for n in range(4)), encoding="utf-8")
    return str(file)


def train_spec(base: str, rows: str, **keys: Any) -> TrainSpec:
    given = {"name": "t", "base": base, "data": {"train": rows}, "num_workers": 1, "quant": {"kind": "none"}}
    return TrainSpec.model_validate({**given, **keys})


@pytest.fixture(autouse=True)
def no_ray_starts() -> Iterator[None]:
    """Another test of this process may have a Ray; no test of this file starts one."""
    before = ray.is_initialized()
    yield
    assert ray.is_initialized() == before


def refused(error: pytest.ExceptionInfo[BaseModelError], reason: str, hint: str) -> None:
    assert reason in error.value.problem
    assert hint in error.value.hint
    assert error.value.rule
    assert error.value.subject


@pytest.mark.parametrize(
    ("kind", "keys", "reason", "hint"),
    [
        ("mixtral", {"adapter": {"targets": "mlp"}}, "experts and routers", "--set adapter.experts=true"),
        ("qwen3", {"adapter": {"experts": True}}, "no experts", "leave adapter.experts out"),
        ("mixtral", {"quant": {"kind": "int8"}}, "14% of its weights would be packed", "--set quant.kind=nf4"),
        ("falcon_h1", {}, "Module 'out_proj' is incompatible", "--set adapter.targets=attention"),
        (
            "falcon_h1",
            {"adapter": {"targets": "attention"}, "objective": {"kind": "sft", "packing": "best_fit"}},
            "recurrent layers",
            "--set objective.packing=none",
        ),
    ],
    ids=str,
)
def test_training_refuses_what_could_not_end_well(
    folders: dict[str, str], rows: str, kind: str, keys: dict[str, Any], reason: str, hint: str
) -> None:
    from graftwork.training.run import check

    spec = train_spec(folders[kind], rows, **keys)
    for stage in (check, lambda one: plan_spec(one, Path())):
        with pytest.raises(BaseModelError) as error:
            stage(spec)
        refused(error, reason, hint)


def test_training_takes_what_can_be_published_and_loaded(folders: dict[str, str], rows: str) -> None:
    from graftwork.training.run import check

    assert check(train_spec(folders["mixtral"], rows)) == []
    assert check(train_spec(folders["mixtral"], rows, adapter={"targets": "mlp", "experts": True})) == []
    assert check(train_spec(folders["gemma3"], rows)) == []
    assert check(train_spec(folders["gemma3"], rows, num_workers=2)) == []


def test_config_check_names_what_a_local_base_does_not_support(
    folders: dict[str, str], rows: str, tmp_path: Path
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(f"kind: train\nname: t\nbase: {folders['mixtral']}\ndata: {{train: {rows}}}\n", encoding="utf-8")
    with pytest.raises(BaseModelError) as error:
        config_check(file, ["num_workers=1", "quant.kind=int8"])
    refused(error, "would be packed", "--set quant.kind=nf4")
    config_check(file, ["quant.kind=none", "adapter.targets=attention"])


def test_a_sweep_refuses_a_base_for_any_of_its_trials(folders: dict[str, str], rows: str, tmp_path: Path) -> None:
    data = {"train": rows, "eval": str(tmp_path / "eval.jsonl")}
    Path(data["eval"]).write_text(json.dumps({**ROW, "id": "9", "prompt": "And KJFK?"}) + "\n", encoding="utf-8")
    train = train_spec(folders["mixtral"], rows, adapter={"targets": "attention"}, data=data)
    space = {"adapter.targets": {"kind": "choice", "values": ["attention", "mlp"]}}
    spec = TuneSpec.model_validate({"name": "s", "train": train.model_dump(), "space": space, "num_trials": 2})
    with pytest.raises(BaseModelError) as error:
        check_sweep(spec)
    refused(error, "experts and routers", "--set adapter.experts=true")


@pytest.mark.parametrize(("kind", "reason"), [("falcon_h1", "recurrent layers")])
def test_every_stage_that_serves_refuses_what_the_engine_cannot(
    folders: dict[str, str], rows: str, tmp_path: Path, kind: str, reason: str
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"name": {"type": "string"}}}), encoding="utf-8")
    usual = {"name": "t", "root": str(tmp_path), "base": folders[kind], "eval": rows, "answer_schema": str(schema)}
    plain = {"quant": {"kind": "none"}}
    arms = [{"name": "one"}, {"name": "two", "max_new_tokens": 4}]
    serve = ServeSpec.model_validate({"base": folders[kind], **plain})
    compare = CompareSpec.model_validate({**usual, **plain, "arms": arms, "baseline": "one"})
    quantize = QuantizeSpec.model_validate({**usual, "arms": arms[:1], "precisions": ["fp32", "bf16"]})
    stages: list[tuple[Any, Any]] = [(check_spec, serve), (run_compare, compare), (run_quantize, quantize)]
    for stage, spec in [*stages, *((lambda one: plan_spec(one, Path()), spec) for _, spec in stages)]:
        with pytest.raises(BaseModelError) as error:
            stage(spec)
        refused(error, reason, "engine.kind=vllm")


def test_precisions_that_pack_a_part_of_the_weights_are_refused(
    folders: dict[str, str], rows: str, tmp_path: Path
) -> None:
    spec = QuantizeSpec.model_validate(
        {
            "name": "t",
            "root": str(tmp_path),
            "base": folders["mixtral"],
            "eval": rows,
            "answer_schema": "s.json",
            "arms": [{"name": "one"}],
        }
    )
    with pytest.raises(BaseModelError, match="precisions: int8") as error:
        check_serving(spec)
    refused(error, "would be packed", "precisions=[fp32, bf16]")


def test_a_vllm_endpoint_is_not_held_to_the_limits_of_our_engine(folders: dict[str, str]) -> None:
    keys = {"base": folders["mixtral"], "quant": {"kind": "none"}, "engine": "vllm", "num_gpus": 1}
    check_serving(ServeSpec.model_validate(keys))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba2", "PEFT cannot attach"),
    ],
)
def test_families_that_raised_errors_of_libraries_have_reasons(kind: str, reason: str) -> None:
    spec = train_spec("b", "r.jsonl")
    with pytest.raises(BaseModelError) as error:
        check_training(spec, config_of(kind))
    assert reason in error.value.problem
    assert error.value.hint


@pytest.mark.parametrize(
    ("kind", "facts", "stage", "reason"),
    [
        ("falcon", {}, "serve", "its code does not take a pass of the engine"),
        ("mpt", {}, "serve", "its code does not take a pass of the engine"),
        ("jetmoe", {}, "packing", "do not follow the positions"),  # reads the router's choice, which has no values yet
        ("biogpt", {"num_hidden_layers": 2}, "packing", "do not follow the positions"),
        ("recurrent_gemma", {"num_hidden_layers": 3}, "serve", "recurrent layers"),  # has other 3-D parameters
    ],
)
def test_families_outside_of_the_matrix_have_reasons(
    kind: str, facts: dict[str, Any], stage: Stage, reason: str
) -> None:
    assert reason in base_support(AutoConfig.for_model(kind, **facts).to_dict()).stages[stage].reason


@pytest.mark.parametrize(
    ("kind", "facts", "problem", "hint"),
    [
        ("deepseek_v2", {"num_experts_per_tok": None}, "has no num_experts_per_tok", "add the number"),
        ("gemma3n", {}, "TimmWrapperModel requires the", "install the library"),
    ],
)
def test_a_base_that_cannot_be_counted_is_named(kind: str, facts: dict[str, Any], problem: str, hint: str) -> None:
    with pytest.raises(BaseModelError) as error:
        base_support(AutoConfig.for_model(kind, **facts).to_dict())
    assert problem in error.value.problem
    assert hint in error.value.hint


def test_a_family_whose_code_reads_packed_weights_is_trained_on_plain_ones() -> None:
    """Gemma-3n clamps two linears in each training step, which fails on bytes."""
    config = config_of("gemma3n_text")
    assert not check_training(train_spec("b", "r.jsonl"), config).stages["train LoRA"].reason
    with pytest.raises(BaseModelError, match="quant.kind=nf4(.|\n)*weights of linear layers by itself"):
        check_training(train_spec("b", "r.jsonl", quant={"kind": "nf4"}), config)


@pytest.mark.parametrize("kind", ["opt", "gpt_oss"])
def test_masks_that_ignore_positions_are_no_masks_of_packed_rows(kind: str) -> None:
    keys = {"adapter": {"targets": "attention"}, "objective": {"kind": "sft", "packing": "best_fit"}}
    with pytest.raises(BaseModelError, match="do not follow the positions(.|\n)*objective.packing=none"):
        check_training(train_spec("b", "r.jsonl", **keys), config_of(kind))


def test_a_plan_shows_the_stages_that_support_the_base(folders: dict[str, str], rows: str) -> None:
    def line(spec: Spec) -> str:
        [plan] = plan_spec(spec, Path())
        return next(note for note in plan.assumptions if note.startswith("base "))

    whole = f"base qwen3 (Qwen3ForCausalLM) supports {', '.join(STAGES)}"
    assert line(train_spec(folders["qwen3"], rows)) == whole
    served = line(ServeSpec.model_validate({"base": folders["gpt2"], "quant": {"kind": "none"}}))
    assert "; not plan: activations are not predicted for an activation function" in served


@pytest.mark.parametrize("kind", ["gemma2", "mixtral"])
def test_the_first_loss_is_that_of_transformers(kind: str, rows: str, tmp_path: Path) -> None:
    """Attention with soft-capped scores where sdpa has none, and the load-balancing loss of a router: on a CPU too."""
    import torch
    from transformers import AutoModelForCausalLM

    from graftwork.training.loop import run_steps
    from graftwork.training.objectives.rows import prepare
    from graftwork.training.worker_messages import TrainJob

    folder = write_family(tmp_path / "base", kind)
    spec = train_spec(
        str(folder),
        rows,
        root=str(tmp_path),
        adapter={"rank": 2, "targets": "attention"},
        quant={"kind": "none", "dtype": "float32"},
        optim={"rows_per_step": 4, "micro_batch": 4},
    )
    data, seen = prepare(spec), []
    run_steps(TrainJob(spec, data, max_steps=1), lambda step: seen.append(step.loss) is None)  # type: ignore[func-returns-value]
    inputs = data.train.collate(range(4), data.pad_id)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        options = {"output_router_logits": True} if kind == "mixtral" else {}
        expected = model(**inputs, **options).loss.item()
        plain = model(**inputs).loss.item()
    assert seen[0] == pytest.approx(expected, rel=1e-5)
    if kind == "mixtral":
        assert expected > plain + 1e-3, "the router's loss is part of it"
