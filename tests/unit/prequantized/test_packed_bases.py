"""Quantised checkpoints as bases: loaded, trained, served, planned. Sources: transformers and PEFT on plain weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

from graftwork.base import load as base_model
from graftwork.base.load import LoadedBase, ResolvedBase
from graftwork.base.model_shape import ModelShape
from graftwork.base.source import BaseSpec
from graftwork.base.support import base_support, check_local
from graftwork.compat.packed_weights import PackedLinear
from graftwork.errors import BaseModelError, ConfigError
from graftwork.planning.memory import weight_bytes
from graftwork.quantization import Precision, QuantSpec, default_dtype
from graftwork.serving.quantize.measure import Material, measure
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import ServeSpec
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.worker_messages import TrainJob
from tests import engines
from tests.docs.extending.common import check_served_as_peft, small_task, train_and_fetch
from tests.fake_arms import airports
from tests.packed_checkpoints import PACKINGS, write_packed
from tests.ranks import Task, train_on
from tests.tiny import write_tiny_base
from tests.training import task

IDS = torch.arange(3, 67).reshape(4, 16)
KEPT = [name for name in PACKINGS if not name.startswith("bnb nf4")]
ONE_OF_EACH = ["fp8 cut blocks", "ct int4 zeros", "awq", "gptq reordered", "torchao intx"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def resolve(folder: Path) -> ResolvedBase:
    return base_model.resolve(BaseSpec(uri=str(folder)))


def load(folder: Path, kind: str, *, dtype: str = "float32", **keys: Any) -> LoadedBase:
    quant = QuantSpec.model_validate({"kind": kind, "dtype": dtype})
    return base_model.load(resolve(folder), quant, device="cpu", purpose=keys.get("purpose", "train"))


def logits(loaded: LoadedBase) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded.model(IDS).logits
    return found


def refused(folder: Path, kind: str, error: str) -> None:
    with pytest.raises(BaseModelError, match=error):
        load(folder, kind)


@pytest.mark.parametrize("name", PACKINGS)
def test_dequantised_weights_are_those_of_the_format_in_each_dtype(plain: Path, tmp_path: Path, name: str) -> None:
    packing, originals = PACKINGS[name], load_file(plain / "model.safetensors")
    folder = write_packed(plain, tmp_path / "packed", packing, files=3)
    packed = resolve(folder).packed
    assert packed is not None
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load(folder, "none", dtype=str(dtype).removeprefix("torch."))
        weights = loaded.model.state_dict()
        for key, weight in originals.items():
            expected = weight.to(dtype)
            if key.endswith("_proj.weight"):
                expected = packed.dequantise(packed.prepare(packing.pack(weight.float())), dtype)
            assert weights[key].dtype == dtype
            assert torch.equal(weights[key], expected), key
        assert f"checkpoint={packed.label}" in loaded.reason
    assert len(list((tmp_path / "cache" / "dequantised").glob("[0-9a-f]*"))) == 2


@pytest.mark.parametrize("name", ["fp8 blocks", "bnb nf4"])
def test_logits_of_dequantised_weights_equal_those_of_transformers(plain: Path, tmp_path: Path, name: str) -> None:
    """transformers reads both on a CPU by itself: FP8 dequantised, nf4 packed."""
    folder = write_packed(plain, tmp_path / "packed", PACKINGS[name])
    expected = engines.load_model(folder)(IDS).logits
    torch.testing.assert_close(logits(load(folder, "none")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KEPT)
def test_kept_weights_give_the_logits_of_dequantised_ones_in_their_own_bytes(
    plain: Path, tmp_path: Path, name: str
) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS[name], files=2)
    kept = load(folder, "checkpoint")
    layers = [module for module in kept.model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    assert torch.equal(logits(kept), logits(load(folder, "none")))
    tensors = {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
    dropped = ("input_scale", "weight_shape", *(() if "reordered" in name else ("g_idx",)))
    stored = sum(t.nbytes for key, t in tensors.items() if "_proj" in key and not key.endswith(dropped))
    held = sum(p.nbytes for layer in layers for p in layer.parameters())
    assert held == stored
    packed = resolve(folder).packed
    assert packed is not None
    predicted = sum(packed.packed_bytes(layer.in_features, layer.out_features) for layer in layers)
    assert abs(predicted - stored) <= 0.005 * stored
    assert not hasattr(kept.model.config, "quantization_config")


@pytest.mark.parametrize("name", ["bnb nf4", "bnb nf4 double"])
def test_kept_4_bit_weights_of_bitsandbytes_stay_in_its_own_layers(plain: Path, tmp_path: Path, name: str) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS[name])
    kept = load(folder, "checkpoint")
    layers = [module for module in kept.model.modules() if isinstance(module, Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert len(layers) == 14
    torch.testing.assert_close(logits(kept), logits(load(folder, "none")), rtol=1e-4, atol=1e-4)
    predicted = weight_bytes(ModelShape.from_config(resolve(folder).config), QuantSpec(kind="checkpoint"))
    assert 0 <= kept.stored_bytes - predicted <= 14 * 1300


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_other_kinds_quantise_the_exact_values(plain: Path, tmp_path: Path, kind: str) -> None:
    """Source: the same method on a checkpoint of the dequantised values."""
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["awq"])
    again = shutil.copytree(plain, tmp_path / "again")
    weights = {key: tensor.contiguous() for key, tensor in load(folder, "none").model.state_dict().items()}
    save_file({key: weights[key] for key in load_file(plain / "model.safetensors")}, again / "model.safetensors")
    assert torch.equal(logits(load(folder, kind)), logits(load(again, kind)))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_through_kept_weights_equal_those_through_plain_ones(plain: Path, tmp_path: Path, name: str) -> None:
    from peft import LoraConfig, get_peft_model

    folder, found = write_packed(plain, tmp_path / "packed", PACKINGS[name]), []
    for kind in ("checkpoint", "none"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(load(folder, kind).model, config)
        torch.autograd.backward(model(IDS, labels=IDS).loss)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    kept, expected = found
    assert len(kept) == 2 * 14
    for key, gradient in kept.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gptq reordered", "checkpoint"),
        pytest.param("fp8 cut blocks", "checkpoint", marks=pytest.mark.long),
        pytest.param("ct int4 zeros", "nf4", marks=pytest.mark.long),
    ],
)
def test_an_adapter_is_trained_and_served_as_peft_does(tmp_path: Path, name: str, kind: str) -> None:
    work = tmp_path / "work"
    small_task(work)
    folder = write_packed(work / "base", tmp_path / "packed", PACKINGS[name])
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    spec = small_task(work, base=str(folder), quant={"kind": kind, "dtype": "float32"})
    check_served_as_peft(spec, train_and_fetch(spec))
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == before


@pytest.mark.parametrize("name", ["torchao int8", "awq"])
def test_the_engine_answers_as_transformers_does_on_dequantised_weights(plain: Path, tmp_path: Path, name: str) -> None:
    from graftwork.serving.engine.engine import NativeEngine

    folder = write_packed(plain, tmp_path / "packed", PACKINGS[name])
    prompts = [[5, 17, 99, 250, 31], list(range(40, 70))]
    expected = engines.peft_greedy(folder, None, prompts, 12, load=lambda one: load(one, "none", purpose="serve").model)
    for kind in ("checkpoint", "none"):
        engine = NativeEngine(load(folder, kind, purpose="serve").model, engines.spec(), "cpu")
        engine.start()
        asked = [engines.request(f"r{n}", prompt, max_new_tokens=12) for n, prompt in enumerate(prompts)]
        assert [answer.tokens for answer in engines.ask(engine, *asked)] == expected
        engine.stop()


def test_experts_in_mxfp4_load_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    config = AutoConfig.for_model(
        "gpt_oss", **sizes, num_local_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors, seeded = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(key).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=seeded, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(115, 121, shape, generator=seeded, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = load(tmp_path, "none", dtype="bfloat16").model.state_dict()
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
    packed = load(tmp_path, "nf4", dtype="bfloat16")
    assert packed.stored_bytes < 0.5 * sum(weight.nbytes for weight in expected.values())
    assert torch.isfinite(packed.model(IDS % 64).logits).all()
    refused(tmp_path, "checkpoint", r"MXFP4 \(experts, groups of 32\): kept are linear layers alone")


def test_experts_in_fp8_load_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    config = AutoConfig.for_model(
        "qwen3_moe", **sizes, num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    folder = write_packed(tmp_path / "plain", tmp_path / "packed", PACKINGS["fp8 blocks"], files=2)
    found, expected = load(folder, "none").model.state_dict(), engines.load_model(folder).state_dict()
    assert found.keys() == expected.keys()
    assert any(weight.dim() == 3 for weight in found.values())
    for key, weight in expected.items():
        assert torch.equal(found[key], weight.float()), key
    assert load(folder, "nf4").stored_bytes < 0.4 * sum(weight.nbytes for weight in found.values())
    with pytest.raises(BaseModelError, match="is no linear layer of the model"):
        load(folder, "checkpoint")
    support = base_support(resolve(folder).config)
    assert support.stages["checkpoint"].reason.startswith("its experts, ")
    assert "packed as FP8 (blocks of 16x32), 3-D parameters" in support.stages["checkpoint"].reason
    assert "quant.kind=none (the exact values" in support.stages["checkpoint"].hint


def test_a_plan_counts_the_bytes_of_the_checkpoint(plain: Path, tmp_path: Path) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["awq"])
    shape, kept = ModelShape.from_config(resolve(folder).config), load(folder, "checkpoint")
    assert weight_bytes(shape, QuantSpec(kind="checkpoint")) == kept.stored_bytes
    assert weight_bytes(shape, QuantSpec(kind="none")) == load(folder, "none").stored_bytes
    assert shape.packed_params == shape.linear_params


def test_a_plan_names_the_format_and_the_kinds_that_it_has(plain: Path, tmp_path: Path) -> None:
    packed = base_support(resolve(write_packed(plain, tmp_path / "packed", PACKINGS["awq"])).config).format_line()
    assert packed.startswith(
        "base llama (LlamaForCausalLM) packed as AWQ int4 (groups of 16) supports plan, none, int8"
    )
    assert packed.endswith("serve adapters")
    assert ", checkpoint, " in packed
    assert "checkpoint" not in base_support(resolve(plain).config).format_line()


def test_a_plain_base_has_nothing_to_keep(plain: Path) -> None:
    refused(plain, "checkpoint", r"quant.kind=checkpoint(.|\n)*no quantization_config")
    spec = small_task(plain.parent, base=str(plain), quant="checkpoint")
    with pytest.raises(BaseModelError, match=r"quant.kind=checkpoint(.|\n)*no quantization_config"):
        check_local(spec)


def test_a_weight_without_its_scales_is_named(plain: Path, tmp_path: Path) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["awq"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "none", r"model.layers.1.mlp.up_proj: it is not packed as AWQ int4")
    assert not list((tmp_path / "cache" / "dequantised").glob("[0-9a-f]*")), "nothing is kept of it"


@pytest.mark.parametrize("kind", ["none", "checkpoint"])
def test_a_float8_weight_without_a_scale_is_named(plain: Path, tmp_path: Path, kind: str) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["fp8 blocks"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, kind, r"model.layers.1.mlp.up_proj.weight: it is stored as F8_E4M3 and has no scale")


def test_the_files_of_the_checkpoint_are_read_and_its_stop_tokens_are_kept(plain: Path, tmp_path: Path) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["fp8 blocks"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    save_file({"model.norm.weight": torch.full((7,), torch.nan)}, folder / "consolidated.safetensors")
    values = logits(load(folder, "none"))
    assert bool(values.isfinite().all())
    [written] = (tmp_path / "cache" / "dequantised").glob("*/generation_config.json")
    assert json.loads(written.read_text()) == {"eos_token_id": [2, 0]}


def test_kept_values_survive_a_cast_of_all_parameters(plain: Path, tmp_path: Path) -> None:
    """As DeepSpeed casts a model to bf16: packed weights and their scales stay as they are in the file."""
    for name in ("fp8 blocks", "awq"):
        model = load(write_packed(plain, tmp_path / name, PACKINGS[name]), "checkpoint").model
        layers = [module for module in model.modules() if type(module).__name__ == "PackedLinear"]
        before = [layer.weight for layer in layers]
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
        assert layers
        assert all(torch.equal(one, layer.weight) for one, layer in zip(before, layers, strict=True))


def test_plain_weights_under_the_settings_of_a_format_are_an_error(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": PACKINGS["gptq"].settings}))
    refused(folder, "none", r"no tensor of its files is packed as GPTQ int4")


def test_a_torchao_class_that_is_not_read_is_named(plain: Path, tmp_path: Path) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["torchao int8"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_type"] = "int4_weight_only"
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "none", r"_proj.weight is a Int8Tensor(.|\n)*Int4Tensor")


def test_vllm_does_not_get_a_quantised_checkpoint(plain: Path, tmp_path: Path) -> None:
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["awq"])
    keys = {"kind": "serve", "name": "served", "base": str(folder), "quant": "none", "num_gpus": 1}
    spec = ServeSpec.model_validate({**keys, "arms": [{"name": "base"}], "engine": {"kind": "vllm"}})
    with pytest.raises(BaseModelError, match=r"engine.kind=vllm: .*packed as AWQ"):
        check_local(spec)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_kept_weights_are_not_sharded(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(ConfigError, match=rf"quant.kind=checkpoint can't go with strategy.kind={strategy}"):
        small_task(tmp_path, quant="checkpoint", strategy={"kind": strategy})


MEASURED = """
import json, sys, threading, time
from pathlib import Path
import torch
from graftwork.prequantized import convert
from graftwork.prequantized.detect import find_format

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

convert.SHARD_BYTES, peak, before = 32 * 2**20, [0], anonymous()
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
source, target = map(Path, sys.argv[1:])
config = json.loads((source / "config.json").read_text())
target.mkdir()
convert.write_plain(source, find_format(config), config, torch.float32, target)
print(peak[0] - before)
"""


@pytest.mark.long
def test_dequantising_takes_the_memory_of_a_file_and_a_weight_not_of_the_base(tmp_path: Path) -> None:
    """192 MiB packed in 12 files, 768 MiB plain; the process' own memory grows by two files of 32 MiB and a weight."""
    folder, side, weight = tmp_path / "base", 2048, torch.zeros(4 * 2048, 2048, dtype=torch.float8_e4m3fn)
    folder.mkdir()
    for number in range(12):
        parts = {"weight": weight, "weight_scale_inv": torch.ones(4 * side // 128, side // 128)}
        tensors = {f"model.layers.{number}.up_proj.{part}": tensor for part, tensor in parts.items()}
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / "plain")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    plain = sum(path.stat().st_size for path in (tmp_path / "plain").glob("*.safetensors"))
    assert plain > 12 * 4 * weight.nbytes
    assert 64 * 2**20 <= int(found.stdout) <= 200 * 2**20


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_ranks_train_on_kept_weights_as_one_process_does(tmp_path: Path) -> None:
    usual = {"optim.epochs": 1, "optim.micro_batch": 2, "eval_every": 6, "data.eval_rows": 7}
    task(tmp_path)
    folder = write_packed(tmp_path / "base", tmp_path / "packed", PACKINGS["fp8 cut blocks"])
    quant = {"kind": "checkpoint", "dtype": "float32"}
    specs = {
        name: task(tmp_path, **{**usual, "base": str(folder), "quant": quant, "strategy.kind": name})
        for name in ("ddp", "zero2")
    }
    data = prepare(specs["ddp"])
    ended = train_on(2, {name: Task(TrainJob(spec, data)) for name, spec in specs.items()}, tmp_path / "ranks")
    alone = run_steps(TrainJob(specs["ddp"], data), lambda _: True)
    assert alone.train_loss[-1][1] < alone.train_loss[0][1], "it learns"
    for name in specs:
        assert dict(ended[name].result.train_loss) == pytest.approx(dict(alone.train_loss), rel=2e-6)
        assert dict(ended[name].result.eval_loss) == pytest.approx(dict(alone.eval_loss), rel=2e-6)


def test_quantize_measures_the_checkpoint_itself(plain: Path, tmp_path: Path) -> None:
    """Kept weights answer as dequantised ones of the same dtype do, in the bytes of the checkpoint."""
    folder = write_packed(plain, tmp_path / "packed", PACKINGS["gptq"])
    own: Precision = "bf16" if default_dtype("cpu")[0] is torch.bfloat16 else "fp32"
    spec = QuantizeSpec.model_validate(
        {
            "name": "tiny",
            "root": str(tmp_path / "root"),
            "base": str(folder),
            "eval": "eval.jsonl",
            "answer_schema": "schema.json",
            "precisions": ["fp32", own, "nf4", "checkpoint"] if own == "bf16" else ["fp32", "nf4", "checkpoint"],
            "arms": [{"name": "base", "max_new_tokens": 6}],
            "text": {"window": 32, "stride": 20},
            "speed": {"batches": [2], "prompt_tokens": 8, "new_tokens": 6, "rounds": 1},
            "engine": {"max_batch": 8, "max_seq_len": 256, "kv_tokens": 4096, "num_threads": 1},
        }
    )
    material = Material(spec.arms, tuple(airports(3)), tuple(range(3, 60)))
    kept, same = measure(spec, "checkpoint", material), measure(spec, own, material)
    assert [said.text for said in kept.arms[0].answers] == [said.text for said in same.arms[0].answers]
    assert kept.arms[0].nats == pytest.approx(same.arms[0].nats, rel=1e-6)
    assert kept.stored_bytes == kept.resident_bytes == kept.predicted_bytes
    assert kept.stored_bytes < 0.7 * same.stored_bytes
    assert "checkpoint=GPTQ int4 (groups of 16)" in kept.reason
    assert "checkpoint" not in QuantizeSpec.model_fields["precisions"].default


def test_a_format_that_is_not_read_ends_every_command_with_the_base_and_the_key(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(BaseModelError, match=rf"base {folder}: quantization_config.quant_method: 'hqq'"):
        resolve(folder)
