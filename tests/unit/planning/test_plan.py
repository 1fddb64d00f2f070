"""What the plan decides: `auto` in a spec, GPUs that are not here, and the way out where nothing fits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwork.artifacts.publish import publish
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.environment import Speed, collect
from graftwork.errors import ArtifactError, BaseModelError, ConfigError
from graftwork.planning.hardware import (
    GIB,
    GPUS,
    RUNS,
    Correction,
    Machine,
    gpu_called,
    learn,
    named_gpu,
    read_corrections,
)
from graftwork.planning.memory import RowSizes, weight_bytes
from graftwork.quantization import QuantSpec
from graftwork.serving.planning import plan_serving
from graftwork.serving.spec import EngineSpec, ServeSpec
from graftwork.stages.plans import plan_spec
from graftwork.storage.store import Store
from graftwork.training.autotune import learn_peak, sizes_of
from graftwork.training.objectives.rows import prepare
from graftwork.training.planning.memory import kind_of, predict_training
from graftwork.training.planning.plan import (
    PADDING,
    TRAIN_EFFICIENCY,
    evaluation_seconds,
    plan_training,
    resolve_auto,
    step_seconds,
)
from graftwork.training.report import TrainReport, memory_notes, plan_of_run, write_page
from graftwork.training.run import ResolvedRun
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob
from tests.adapters import facts, write_adapter
from tests.families import config_of
from tests.shapes import LLAMA_8B, SMOLLM2
from tests.tiny import write_tiny_base
from tests.training import task

MACHINE = Machine(cores=2, memory_bytes=8 * GIB, speed=Speed(gflops=65.0, gbytes_per_s=20.0))
AUTO = {"micro_batch": "auto", "gradient_checkpointing": "auto"}
FULL = {"adapter": {"kind": "full"}, "quant": {"kind": "none"}}
ROWS = RowSizes.from_lengths([2048] * 64, [1024] * 64)


def spec(**keys: Any) -> TrainSpec:
    return TrainSpec.model_validate(
        {"name": "t", "base": "b", "data": {"train": "t.jsonl"}, "max_length": 2048, "num_workers": 1, **keys}
    )


def on(gpu: str) -> Machine:
    return Machine.with_gpus(GPUS[gpu])


def test_auto_takes_the_fastest_that_fits_and_says_why() -> None:
    asked = spec(optim={"rows_per_step": 16, **AUTO}, gpus_per_worker=1, quant={"kind": "none"})
    large = resolve_auto(asked, LLAMA_8B, ROWS, on("h200"))
    small = resolve_auto(asked, LLAMA_8B, ROWS, on("rtx4090"))
    assert large.spec.optim.gradient_checkpointing is False
    assert small.spec.optim.gradient_checkpointing is True
    assert any(note.startswith("gradient_checkpointing=on (predicted ") for note in small.notes)
    assert any("accumulation=" in note and note.startswith("micro_batch=") for note in small.notes)
    for machine, found in ((on("h200"), large.spec), (on("rtx4090"), small.spec)):
        assert predict_training(found, LLAMA_8B, ROWS, value_bytes=2).peak_bytes < 0.95 * machine.memory_bytes
        others = (
            asked.with_({"optim.micro_batch": n, "optim.gradient_checkpointing": c})
            for n in (1, 2, 4, 8, 16)
            for c in (False, True)
        )
        fitting = [
            one
            for one in others
            if predict_training(one, LLAMA_8B, ROWS, value_bytes=2).peak_bytes < 0.95 * machine.memory_bytes
        ]
        fastest = min(step_seconds(one, LLAMA_8B, ROWS, machine, 1) for one in fitting)
        assert step_seconds(found, LLAMA_8B, ROWS, machine, 1) <= 1.01 * fastest


def test_what_was_given_is_kept() -> None:
    given = spec(optim={"rows_per_step": 16, "micro_batch": 2, "gradient_checkpointing": "auto"})
    assert resolve_auto(given, SMOLLM2, ROWS, MACHINE).spec.optim.micro_batch == 2
    plain = spec(quant={"resident": "packed"})
    assert resolve_auto(plain, SMOLLM2, ROWS, MACHINE).spec is plain


def test_nf4_lies_unpacked_on_a_cpu_where_that_fits() -> None:
    short, roomy = RowSizes.from_lengths([128] * 64, [64] * 64), replace(MACHINE, memory_bytes=64 * GIB)
    form = {
        gib: resolve_auto(spec(), SMOLLM2, short, replace(MACHINE, memory_bytes=int(gib * GIB))).spec.quant.resident
        for gib in (8, 1.9, 1)
    }
    assert form == {8: "dequantised", 1.9: "packed", 1: "auto"}, "where nothing fits it stays as it was asked for"
    found = resolve_auto(spec(), SMOLLM2, short, roomy).spec
    packed = spec(quant={"resident": "packed"})
    assert step_seconds(found, SMOLLM2, short, roomy, 1) < step_seconds(packed, SMOLLM2, short, roomy, 1)
    assert resolve_auto(spec(gpus_per_worker=1), SMOLLM2, short, on("h100")).spec.quant.resident == "auto"


def test_auto_where_nothing_fits_names_the_cheapest_change_that_does() -> None:
    asked = spec(optim={"rows_per_step": 8, **AUTO}, gpus_per_worker=1, quant={"kind": "none"})
    with pytest.raises(ConfigError) as error:
        resolve_auto(asked, LLAMA_8B, ROWS, on("t4").at(QuantSpec(kind="none")))
    assert "of 14.6 GiB a GPU" in error.value.problem
    assert error.value.hint.startswith("--set ")
    changes = dict(one.split("=") for one in error.value.hint.removeprefix("--set ").split(" --set "))
    changed = asked.with_({"optim.micro_batch": 1, "optim.gradient_checkpointing": True, **changes})
    peak = predict_training(changed, LLAMA_8B, ROWS, value_bytes=4).peak_bytes
    assert peak < 0.95 * GPUS["t4"].memory_bytes


def test_all_weights_of_8b_do_not_fit_one_h100_and_the_plan_says_what_does() -> None:
    full = spec(**FULL, optim={"rows_per_step": 8, "lr": 1e-5}, gpus_per_worker=1)
    plan = plan_training(full, LLAMA_8B, ROWS, None, on("h100"))
    assert not plan.fits
    assert plan.verdict.startswith("needs ")
    assert "strategy.kind=zero" in plan.verdict
    least = {"optim.gradient_checkpointing": True, "optim.micro_batch": 1}
    shared = {"num_workers": 8, "strategy": {"kind": "zero3"}, **least}
    assert plan_training(full.with_(shared), LLAMA_8B, ROWS, None, on("h100")).fits


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_each_stage_of_zero_shares_more(kind: str) -> None:
    """ZeRO, arXiv 1910.02054, figure 1: states of all weights, over 8 workers."""
    order = ["ddp", "zero1", "zero2", "zero3"]
    full = spec(**FULL, optim={"lr": 1e-5}, num_workers=8, gpus_per_worker=1)

    def states(strategy: str) -> int:
        plan = predict_training(full.with_({"strategy.kind": strategy}), LLAMA_8B, ROWS, value_bytes=2)
        return sum(plan.part(name) for name in ("trained weights", "gradients", "optimizer"))

    assert states(kind) < states(order[order.index(kind) - 1])
    if kind == "zero3":  # bf16 weights and gradients, fp32 weights and two moments: 16 bytes a weight over 8 workers
        assert states(kind) == pytest.approx(16 * LLAMA_8B.params / 8, rel=1e-6)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    full = spec(**FULL, optim={"lr": 1e-5}, num_workers=8, gpus_per_worker=1)
    stays = predict_training(full.with_({"strategy": {"kind": "zero2"}}), LLAMA_8B, ROWS, value_bytes=2)
    moved = predict_training(
        full.with_({"strategy": {"kind": "zero2", "offload_optimizer": "cpu"}}), LLAMA_8B, ROWS, value_bytes=2
    )
    assert moved.part("optimizer") == 0
    assert dict(moved.host)["offloaded"] == stays.part("optimizer")


def test_a_gpu_without_bfloat16_computes_in_float32_or_is_refused() -> None:
    plan = plan_training(spec(gpus_per_worker=1), SMOLLM2, ROWS, None, on("t4").at(QuantSpec()))
    assert any("no bfloat16" in warning for warning in plan.warnings)
    with pytest.raises(BaseModelError, match="SM 7.0"):
        on("v100").at(QuantSpec(dtype="bfloat16"))
    assert on("a100-40").at(QuantSpec()).value_bytes == 2


def test_int8_is_advised_against() -> None:
    [warning] = plan_training(spec(quant={"kind": "int8"}), SMOLLM2, RowSizes.at_most(64), None, MACHINE).warnings
    assert "int8" in warning


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("A100-80G", None, "a100-80"),
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("AMD Instinct MI300X", 192.0, None),
    ],
)
def test_gpus_are_known_by_the_names_of_driver_and_ray(name: str, memory: float | None, expected: str | None) -> None:
    found = gpu_called(name, memory)
    assert (found.name if found else None) == expected


def test_an_unknown_gpu_is_refused_and_a_file_of_its_figures_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpu rtx4090"):
        named_gpu("rtx49")
    file = tmp_path / "card.yaml"
    file.write_text("{memory_gib: 47.5, sm: 8.9, tflops: 181, fp32_tflops: 91, gbytes_per_s: 960}", encoding="utf-8")
    assert named_gpu(str(file)).memory_bytes == int(47.5 * GIB)
    file.write_text("{memory: 47.5}", encoding="utf-8")
    with pytest.raises(ConfigError, match="memory_gib"):
        named_gpu(str(file))


def test_a_spec_is_planned_for_gpus_from_a_laptop(tmp_path: Path) -> None:
    [plan] = plan_spec(task(tmp_path / "task"), Path(), GPUS["h100"], 2)
    assert (plan.processes, plan.fits) == (2, True)
    assert plan.step_s is not None
    assert plan.step_s > 0


def test_passes_that_score_rows_take_time() -> None:
    """KTO: a forward pass over mismatched answers each step, 2 of 6 parts, and two before; DPO: one before."""
    keys = {"optim": {"rows_per_step": 16, "micro_batch": 4, "lr": 1e-5, "gradient_checkpointing": False}}
    plans = {
        kind: plan_training(
            spec(objective={"kind": kind}, gpus_per_worker=1, quant={"kind": "none"}, **keys),
            LLAMA_8B,
            ROWS,
            None,
            on("h100"),
        )
        for kind in ("orpo", "dpo", "kto")
    }
    once = plans["dpo"].seconds - plans["orpo"].seconds
    assert once == pytest.approx(64 * 2048 * 2 * LLAMA_8B.params / (989e12 * 0.34), rel=0.1)
    steps = {kind: plan.step_s or 0.0 for kind, plan in plans.items()}
    assert steps["dpo"] == steps["orpo"]
    assert steps["kto"] / steps["orpo"] == pytest.approx(1.5, rel=0.06)
    assert plans["kto"].seconds - plans["orpo"].seconds == pytest.approx(
        2 * once + 4 * (steps["kto"] - steps["orpo"]), rel=0.01
    )


def test_an_optimizer_takes_its_own_time() -> None:
    """All weights, one short row: 28 and 16 bytes a weight; Muon's products are those of 5 iterations of a matrix."""
    row, times = RowSizes.at_most(16), {}
    for kind in ("adamw", "adamw_8bit", "muon"):
        keys = {"optim": {"kind": kind, "lr": 1e-5, "rows_per_step": 1, "gradient_checkpointing": False}}
        times[kind] = step_seconds(spec(gpus_per_worker=1, **FULL, **keys), LLAMA_8B, row, on("h200"), 1)
    bandwidth = GPUS["h200"].gbytes_per_s * 1e9 * 0.75
    assert times["adamw"] - times["adamw_8bit"] == pytest.approx(12 * LLAMA_8B.params / bandwidth, rel=0.01)
    sides = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14336)] * 3
    products = 32 * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides) / (989e12 * 0.5)
    assert times["muon"] - times["adamw"] == pytest.approx(products + 12 * LLAMA_8B.params / bandwidth, rel=0.01)


def test_held_out_rows_take_the_time_of_their_attention() -> None:
    """4 operations for each pair of tokens, head and its size; kept scores are moved through the memory."""
    asked, short, long = spec(), RowSizes.from_lengths([1024] * 8, [0] * 8), RowSizes.from_lengths([2048] * 8, [0] * 8)

    def seconds(rows: RowSizes, score_bytes: float = 0.0) -> float:
        shape = replace(LLAMA_8B, score_bytes=(score_bytes, score_bytes))
        return evaluation_seconds(asked, shape, rows, MACHINE, 1)

    pairs = 8 * 32 * 32 * (2048**2 - 2 * 1024**2)
    rate = 1 / MACHINE.core_s(1, TRAIN_EFFICIENCY) * MACHINE.pace(1, asked.cpus_per_worker)
    assert seconds(long) - 2 * seconds(short) == pytest.approx(4 * 128 * PADDING * pairs / rate)
    moved = 16 * 8 * 32 * 32 * 2048**2 * MACHINE.value_bytes / (20e9 * MACHINE.pace(1, asked.cpus_per_worker))
    assert seconds(long, score_bytes=8.0) - seconds(long) == pytest.approx(moved)


def test_a_server_counts_what_its_adapters_adapt(tmp_path: Path) -> None:
    """Attention's queries alone, and all experts: bytes of A and B; one that is not published is taken as usual."""
    config = config_of("qwen3_moe")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape, root = ModelShape.from_config(config), tmp_path / "root"
    methods: dict[str, dict[str, Any]] = {
        "queries": {"target_modules": ["q_proj"]},
        "experts": {"experts": True, "targets": "attention"},
        "merged": {"rank": 512, "targets": "mixed"},
        "of-gpt2": {"target_modules": ["c_attn"]},
    }
    for name, keys in methods.items():
        method = {"kind": "lora", "rank": 8, "objective": "sft", **keys}
        publish(Store(str(root)), name, write_adapter(tmp_path / name), **facts(method=method), alias="prod")

    def adapters(*names: str) -> float:
        spec = {"base": str(tmp_path / "config.json"), "root": str(root), "quant": {"kind": "none"}}
        [plan] = plan_spec(ServeSpec.model_validate({**spec, "adapters": [f"{one}@prod" for one in names]}), tmp_path)
        return dict(plan.parts)["adapters"]

    queries = sum(8 * (x.inputs + x.outputs) * x.count for x in shape.linears if x.name.endswith(".q_proj"))
    inner = sum(8 * (x.inputs + x.outputs) * x.count for x in shape.experts)
    value = adapters("queries") / queries
    assert value in (2 * 2, 2 * 4), "in host memory and in a slot, in 16 bits or fp32"
    assert adapters("experts") == value * (shape.adapter_params(8, "attention") + inner)
    assert adapters("queries", "other") == value * (queries + shape.adapter_params(16))
    assert adapters("merged") == value * shape.adapter_params(512)
    with pytest.raises(ArtifactError, match=r"adapter of-gpt2@prod: .* another base"):
        adapters("queries", "of-gpt2")


def test_an_adapter_of_another_base_is_refused_as_serving_does(tmp_path: Path) -> None:
    base, root = write_tiny_base(tmp_path / "base"), tmp_path / "root"
    publish(Store(str(root)), "kept", write_adapter(tmp_path / "kept"), **facts(), alias="prod")
    keys = {"base": str(base), "root": str(root), "adapters": ["kept@prod"]}
    with pytest.raises(ArtifactError, match=r"adapter kept@.* it was trained on base b{64}"):
        plan_spec(ServeSpec.model_validate(keys), tmp_path)


def test_serving_is_planned_for_gpus() -> None:
    """vLLM's rule of thumb for Llama-3-8B in bf16: 15 GiB of weights, 128 KiB a token of keys and values."""
    engine = EngineSpec(kv_tokens=65_536, max_seq_len=4096)
    plain = QuantSpec(kind="none")
    plan = plan_serving("serve", LLAMA_8B, plain, engine, on("h100").at(plain))
    parts = dict(plan.parts)
    assert parts["base weights"] == pytest.approx(15.0 * GIB, rel=0.01)
    assert parts["key-value memory"] == 65_536 * 128 * 1024
    assert plan.fits
    small = plan_serving("serve", LLAMA_8B, plain, engine, on("a10").at(plain), replicas=2)
    assert "22.0 GiB a GPU; fits with engine.kv_tokens=" in small.verdict


def test_a_run_settles_once_and_goes_on_as_it_began(tmp_path: Path) -> None:
    asked = task(tmp_path / "task", **{"optim.micro_batch": "auto", "optim.gradient_checkpointing": "auto"})
    run = ResolvedRun.resolve(asked)
    first = run.with_auto_resolved()
    assert isinstance(first.spec.optim.micro_batch, int)
    assert first.spec.optim.gradient_checkpointing is False
    assert first.spec.quant.resident == "dequantised"
    assert len(first.notes) == 3
    assert run.paths.run_id == ResolvedRun.resolve(first.spec).paths.run_id, (
        "what auto became is no part of a run's identity"
    )
    recorded = first.spec.with_({"optim.micro_batch": 1})
    run.paths.store.write_bytes(yaml.safe_dump(recorded.model_dump(mode="json")).encode(), *run.paths.spec())
    again = run.with_auto_resolved()
    assert again.spec.optim.micro_batch == 1
    assert "as the run began" in again.notes[0]


def test_runs_raise_later_plans_of_their_kind_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    assert read_corrections("cpu") == {}
    learn("cpu", kind_of(spec()), predicted_bytes=100, measured_bytes=120)
    learn("cpu", kind_of(spec()), predicted_bytes=100, measured_bytes=105)
    assert read_corrections("cpu") == {"sft lora nf4": Correction(1.2, 2)}, "the largest of the newest runs"
    rows = RowSizes.at_most(64)
    taught = replace(MACHINE, peaks=read_corrections("cpu"))
    plain, corrected = (plan_training(spec(), SMOLLM2, rows, None, machine) for machine in (MACHINE, taught))
    assert corrected.peak_bytes_per_process == round(1.2 * plain.peak_bytes_per_process)
    assert sum(size for _, size in corrected.parts) == corrected.peak_bytes_per_process
    assert dict(corrected.parts)["correction from 2 earlier runs on this machine"] > 0
    for other in ({"quant": {"kind": "none"}}, {"objective": {"kind": "dpo"}}, {"adapter": {"kind": "ia3"}}):
        plans = [plan_training(spec(**other), SMOLLM2, rows, None, machine) for machine in (MACHINE, taught)]
        assert plans[0].parts == plans[1].parts, other
    assert resolve_auto(spec(optim=AUTO), SMOLLM2, rows, replace(taught, memory_bytes=64 * GIB)).notes, (
        "auto sees it too"
    )


def test_a_plan_is_never_lowered_and_a_correction_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    assert learn("h100", "sft lora none", predicted_bytes=100, measured_bytes=1000) == Correction(1.5, 1)
    assert learn("t4", "sft lora none", predicted_bytes=100, measured_bytes=1) == Correction(1.0, 1)
    asked = spec(quant={"kind": "none"}, gpus_per_worker=1)
    found = plan_training(asked, SMOLLM2, ROWS, None, on("t4"))
    assert found.parts == plan_training(asked, SMOLLM2, ROWS, None, replace(on("t4"), peaks={})).parts
    for _ in range(RUNS):
        learn("h100", "sft lora none", predicted_bytes=100, measured_bytes=104)
    assert read_corrections("h100")["sft lora none"] == Correction(1.04, RUNS), (
        "one odd run does not count for all time"
    )


def test_a_runs_final_peak_is_what_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = task(tmp_path / "task")
    job = TrainJob(asked, prepare(asked))
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    predicted = predict_training(
        asked, ModelShape.from_config(base_model.resolve(asked.base).config), sizes_of(job.data.train)
    ).peak_bytes
    result = LoopResult(3, False, (), (), 10, 1.0, (predicted, round(1.25 * predicted)), (0, 0), steps_this_attempt=1)
    learn_peak(job, result)
    assert read_corrections("cpu") == {}, "a run that goes on for one step has not reached its peak"
    learn_peak(job, replace(result, steps_this_attempt=2))
    assert read_corrections("cpu") == {kind_of(asked): Correction(1.25, 1)}


def test_links_are_those_of_the_gpus(tmp_path: Path) -> None:
    """All weights of Llama-3-8B, 8 x H100 SXM, 1 x 2,048 tokens: NVLink 4 sends 450 GB/s each way, PCIe 4 31.5."""
    full = spec(
        **FULL,
        num_workers=8,
        gpus_per_worker=1,
        strategy={"kind": "zero3"},
        optim={"rows_per_step": 8, "micro_batch": 1, "lr": 1e-5},
    )

    def step_s(gpu: str, workers: int = 8) -> float:
        asked = full.with_({"num_workers": workers, "optim.rows_per_step": workers})
        return step_seconds(asked, LLAMA_8B, ROWS, Machine.with_gpus(named_gpu(gpu)), workers)

    computed_s = step_s("h100,link_gbytes_per_s=1e9")
    sent = 7 / 8 * LLAMA_8B.params * 2 * 3  # bf16: weights twice, gradients once
    assert step_s("h100") - computed_s == pytest.approx(sent / (450e9 * 0.63), rel=1e-3)
    assert step_s("h100,link_gbytes_per_s=31.5") - computed_s == pytest.approx(sent / (31.5e9 * 0.63), rel=1e-3)
    assert step_s("h100") < 0.6
    assert step_s("h100", 16) > 2 * step_s("h100"), "the exchange of two machines goes over their network"
    assert step_s("h100,per_machine=16", 16) < 1.1 * step_s("h100")
    assert GPUS["l4"].link_gbytes_per_s == 31.5
    with pytest.raises(ConfigError, match="network_gbytes"):
        named_gpu("h100,network_gbytes=12.5")
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        named_gpu("h100,nvlink")


def test_plan_output_and_report_show_one_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `plan` prints is stored when the run starts; what other runs teach meanwhile does not change it."""
    asked = task(tmp_path / "task", **{"outcomes": {"task": {"rows": 4, "max_new_tokens": 5}}})
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    learn("cpu", kind_of(asked), predicted_bytes=100, measured_bytes=110)
    [printed] = plan_spec(asked, Path())
    assert any(name == "correction from 1 earlier run on this machine" for name, _ in printed.parts)
    assert any(line.startswith("outcomes take ") for line in printed.assumptions)
    run = ResolvedRun.resolve(asked).with_auto_resolved()
    run.paths.store.write_json(plan_of_run(run.spec, run.base, run.data, run.probes), *run.paths.plan())
    run.paths.store.write_json(collect(0), *run.paths.provenance())
    learn("cpu", kind_of(asked), predicted_bytes=100, measured_bytes=140)
    predicted = printed.peak_bytes_per_process
    [note] = memory_notes(run.paths, (predicted // 2, predicted + 2**28))
    assert note == (
        f"memory of a worker: {predicted / GIB:.2f} GiB predicted, {predicted / GIB + 0.25:.2f} GiB at the peak"
    )
    report = TrainReport(
        "r", "t@v", "v", False, 1, 48, 0, 10, 1.0, 10.0, ((1, 1.0),), (), (predicted // 2, predicted + 2**28), (0, 0)
    )
    page, missing = write_page(run.paths, run.spec, report, None, ())
    assert missing == ()
    shown = json.loads(Path(page.json_uri).read_text(encoding="utf-8"))["plan"]
    assert [(row["predicted_bytes"], row["actual_bytes"]) for row in shown] == [(predicted, predicted + 2**28)]


def test_a_base_with_experts_counts_all_weights_and_computes_with_the_active_ones() -> None:
    """Qwen3-30B-A3B by its config: 30.5B parameters, 3.3B of them active, as its model card says."""
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    }
    shape = ModelShape.from_config(config)
    assert shape.params / 1e9 == pytest.approx(30.5, abs=0.05)
    assert shape.active_params / 1e9 == pytest.approx(3.3, abs=0.06)
    assert shape.describe_experts() == "30.5B parameters, 3.35B active per token (8 of 128 experts)"
    # half a byte and a 64th of an fp32 scale a weight of attention and experts; embedding, head, routers, norms in bf16
    packed = 48 * (2048 * (2 * 4096 + 2 * 512) + 128 * 3 * 2048 * 768)
    expected = packed * 0.5625 + (shape.params - packed) * 2
    assert weight_bytes(shape, QuantSpec(kind="nf4"), 2) == pytest.approx(expected)
    assert expected / GIB == pytest.approx(16.8, abs=0.1)
    keys = {"gpus_per_worker": 1, "num_workers": 1, "quant": {"kind": "none"}}
    spec = TrainSpec.model_validate({"name": "t", "base": "b", "data": {"train": "t.jsonl"}, **keys})
    gpu, all_of_them = Machine.with_gpus(GPUS["h100"]), replace(shape, experts_per_token=128)
    some_s, all_s = (step_seconds(spec, one, RowSizes.at_most(2048), gpu, 1) for one in (shape, all_of_them))
    assert all_of_them.active_linear_params > 8 * shape.active_linear_params
    assert all_s > 4 * some_s, "the time follows the active parameters"
    dense = ModelShape.from_config({**config, "model_type": "qwen3"})
    assert dense.active_params == dense.params
    assert dense.describe_experts() == ""
