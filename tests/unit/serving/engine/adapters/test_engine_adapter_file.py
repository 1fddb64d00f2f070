"""What an adapter's config and weights may say: honoured or refused by name, never ignored."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.adapters.spec import PEFT_KINDS, name_of
from graftwork.artifacts.verify import CONFIG_FILE, WEIGHTS_FILE
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import ReadOptions, SiteWeights
from graftwork.serving.engine.adapters.kinds import SERVED, read_adapter, reader_of
from graftwork.serving.engine.lora_layers import Sites
from tests import engines

A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ROWS_KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return engines.write_lora(base, tmp_path / "adapter", 1, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])


def read(base: Path, folder: Path, max_rank: int = 16) -> dict[str, SiteWeights]:
    model = engines.load_model(base)
    view = BaseView(model, Sites(model).shapes)
    return dict(read_adapter(folder, view, ReadOptions(max_rank, torch.float32)).linears)


def change_config(folder: Path, **changed: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["norm"]),
        ("modules_to_save", ["mlp"]),
        ("modules_to_save", ["no_such_module"]),
        ("modules_to_save", 3),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", [512]),
        ("trainable_token_indices", {"norm": [1]}),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("megatron_config", {"a": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("r", 0),
        ("r", "8"),
        ("lora_alpha", None),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "16"}),
        ("target_modules", None),
        ("target_modules", ["q_proj", "v_proj", "no_such_proj"]),
        ("a_key_of_a_later_peft", {"on": True}),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_key(base: Path, folder: Path, key: str, value: object) -> None:
    change_config(folder, **{key: value})
    with pytest.raises(ArtifactError) as refused:
        read(base, folder)
    assert key in refused.value.problem
    assert refused.value.rule


@pytest.mark.parametrize("config", [{"bias": "lora_only"}, {"modules_to_save": ["norm"]}])
def test_what_peft_itself_saves_with_such_a_config_is_refused(
    base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = engines.write_lora(base, tmp_path, 1, r=4, target_modules=["q_proj"], **config)
    with pytest.raises(ArtifactError, match=next(iter(config))):
        read(base, folder)


def test_lora_on_embeddings_or_the_output_layer_is_refused(base: Path, tmp_path: Path) -> None:
    for target in ("embed_tokens", "lm_head"):
        folder = engines.write_lora(base, tmp_path / target, 1, r=4, target_modules=["q_proj", target])
        with pytest.raises(ArtifactError, match=r"inner linears|every target is a linear"):
            read(base, folder)


def test_rank_above_the_limit_is_refused(base: Path, folder: Path) -> None:
    assert {weights.rank for weights in read(base, folder, max_rank=8).values()} == {8}
    with pytest.raises(ArtifactError, match=r"r=8(.|\n)*max_rank=4"):
        read(base, folder, max_rank=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A_KEY), "no lora_A"),
        (lambda t: t.update({A_KEY: t[A_KEY][:4].contiguous()}), r"\[4, 64\]\s+Rule: this base needs \[8, 64\]"),
        (lambda t: t.update({A_KEY: t[A_KEY].double() / 0}), "inf or nan"),
        (lambda t: t.update({A_KEY: t[A_KEY].to(torch.int8)}), "dtype 'I8'"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "extra.weight"),
        (lambda t: [t.pop(key) for key in list(t) if "layers.1.self_attn.v_proj" in key], "no weights for .*v_proj"),
        (lambda t: t.update({k.replace("q_proj", "k_proj"): v.clone() for k, v in t.items()}), "k_proj"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(ArtifactError, match=message):
        read(base, folder)


def test_every_kind_of_peft_that_is_not_served_is_refused_with_a_hint(base: Path, folder: Path) -> None:
    from peft import PeftType

    others = [kind.value for kind in PeftType if kind.value not in SERVED]
    assert len(others) > 30
    for kind in others:
        change_config(folder, peft_type=kind)
        with pytest.raises(ArtifactError, match=f"peft_type='{kind}'") as refused:
            read(base, folder)
        assert "LORA, IA3" in refused.value.rule
        assert re.search("convert_to_lora|train it as one of those", refused.value.hint)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {"use_dora": True},
            lambda t: t.pop(A_KEY.replace("lora_A.weight", "lora_magnitude_vector")),
            "no tensor .*magni",
        ),
        ({"trainable_token_indices": [1, 2]}, lambda t: t.pop(ROWS_KEY), "no tensor .*trainable_tokens_delta"),
        ({"trainable_token_indices": [1, 2]}, lambda t: t.update({ROWS_KEY: t[ROWS_KEY][:1]}), r"needs \[2, 64\]"),
        ({"modules_to_save": ["lm_head"]}, lambda t: t.pop("base_model.model.lm_head.weight"), "no tensor .*lm_head"),
    ],
)
def test_weights_that_the_config_asks_for_and_that_are_not_there_are_refused(
    base: Path,
    tmp_path: Path,
    config: dict[str, Any],
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    folder = engines.write_lora(base, tmp_path, 1, r=4, target_modules=["q_proj"], **config)
    change_weights(folder, change)
    with pytest.raises(ArtifactError, match=message):
        read(base, folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_unreadable_files_are_refused(base: Path, folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=name):
        read(base, folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=name):
        read(base, folder)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": r".*layers\.1\..*_proj"},
        {"r": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"^model.layers.0.*q_proj": 2}},
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
    ],
)
def test_ranks_and_scalings_are_pefts(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    folder = engines.write_lora(base, tmp_path, 1, **config)
    peft = PeftModel.from_pretrained(engines.load_model(base), folder)
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in peft.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert {name: (weights.rank, weights.scaling) for name, weights in read(base, folder).items()} == expected


def test_every_kind_that_is_published_has_a_reader_of_its_own_name() -> None:
    assert set(PEFT_KINDS) < set(SERVED)
    for peft_type, kind in PEFT_KINDS.items():
        assert reader_of(peft_type).__module__.rpartition(".")[2] == name_of(kind)
