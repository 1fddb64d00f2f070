"""Bottleneck adapters beside LoRA and the base: each row says what a model with the networks built in says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftwork.artifacts import publish as artifact
from graftwork.errors import ArtifactError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import Store
from tests import engines
from tests.adapters import facts

KINDS: dict[str, dict[str, Any]] = {
    "houlsby": {"scaling": 0.5},
    "pfeiffer": {"target_modules": ["down_proj"], "activation": "relu", "bottleneck_size": 10},
    "no-bias": {"use_bias": False, "activation": "silu", "target_modules": ["q_proj", "o_proj"]},
}


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        kind: engines.write_bottleneck(base, root / kind, n, **config) for n, (kind, config) in enumerate(KINDS.items())
    }


class WithNetwork(torch.nn.Module):
    """A linear with torch's own layers behind it."""

    def __init__(self, linear: torch.nn.Module, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        super().__init__()
        down, up = tensors["down.weight"], tensors["up.weight"]
        self.linear, self.scaling, bias = linear, config["scaling"], config["use_bias"]
        activations = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}
        first = torch.nn.Linear(down.shape[1], down.shape[0], bias=bias)
        last = torch.nn.Linear(up.shape[1], up.shape[0], bias=bias)
        self.network = torch.nn.Sequential(first, activations[config["activation"]], last)
        names = {"down": "0", "up": "2"}
        self.network.load_state_dict(
            {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": tensor for key, tensor in tensors.items()}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        changed: torch.Tensor = result + self.network(result) * self.scaling
        return changed


def expected(base: Path, folder: Path, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy by transformers' generate."""
    model, config = engines.load_model(base), json.loads((folder / "adapter_config.json").read_text())
    networks: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, half = key.removeprefix("base_model.model.").partition(".bottleneck_")
        networks.setdefault(module, {})[half] = tensor
    for module, tensors in networks.items():
        model.set_submodule(module, WithNetwork(model.get_submodule(module), tensors, config).eval())
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def test_a_mixed_batch_with_bottlenecks_answers_as_each_model_alone(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    lora = engines.write_lora(base, tmp_path / "lora", 1, r=4, target_modules=list(engines.ALL))
    engine = NativeEngine(engines.load_model(base), engines.spec(prefill_tokens=16), "cpu")
    for version, folder in {**adapters, "lora": lora}.items():
        engine.load_adapter(version, folder)
    assert {state.version: state.rank for state in engine.adapters()} == {
        "houlsby": 6,
        "pfeiffer": 10,
        "no-bias": 6,
        "lora": 4,
    }
    engine.start()
    prompts = [[5 + n * 7 % 90 for n in range(length)] for length in (3, 40)]
    names: list[str | None] = [None, *adapters, "lora"]
    asked = [
        engines.request(f"{name}{n}", prompt, name, max_new_tokens=8)
        for n, prompt in enumerate(prompts)
        for name in names
    ]
    answers = {one.request_id: answer for one, answer in zip(asked, engines.ask(engine, *asked), strict=True)}
    engine.stop()
    plain = engines.peft_greedy(base, None, prompts, 8)
    wanted: dict[str | None, list[list[int]]] = {None: plain, "lora": engines.peft_greedy(base, lora, prompts, 8)}
    wanted |= {kind: expected(base, folder, prompts, 8) for kind, folder in adapters.items()}
    for name in names:
        assert [answers[f"{name}{n}"].tokens for n in range(2)] == wanted[name], name
        assert name is None or wanted[name] != plain


def test_it_is_published_like_any_other(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    manifest = artifact.publish(store, "support", adapters["houlsby"], **facts())
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    engine.load_adapter(manifest.version, artifact.fetch(store, "support", manifest.version), digests)
    assert [state.rank for state in engine.adapters()] == [6]
    engine.stop()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "swiglu"}, "activation='swiglu'"),
        ({"bottleneck_size": 0}, "bottleneck_size=0"),
        ({"bottleneck_size": 7}, r"down.weight \[6, 64\](.|\n)*needs \[7, 64\]"),
        ({"bottleneck_size": 65}, "engine.max_rank=64"),
        ({"scaling": "big"}, "scaling='big'"),
        ({"target_modules": ["down_proj"]}, "target_modules"),
        ({"target_modules": ["o_proj", "down_proj", "up_proj"]}, "no weights for .*up_proj"),
        ({"use_bias": False}, "bottleneck_down.bias"),
        ({"dropout_schedule": 3}, "dropout_schedule=3"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(
    base: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = engines.write_bottleneck(base, tmp_path / "adapter", 1)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
    with pytest.raises(ArtifactError, match=message):
        engine.load_adapter("v", folder)
    engine.stop()
