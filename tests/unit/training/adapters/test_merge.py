"""Adapters merged offline: the sums against numpy, what can't be added, and where a merged one says it came from."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from peft import LoraConfig
from safetensors.numpy import load_file
from typer.testing import CliRunner

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cli import app
from graftwork.errors import ArtifactError, ConfigError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import Store
from graftwork.training.adapters.merge import Merged, MergeSpec, merge_published
from tests import engines
from tests.adapters import facts
from tests.tiny import write_tiny_base

Deltas = dict[str, NDArray[np.float64]]
CONFIGS: dict[str, Any] = {
    "card": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "agent": LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    "steady": LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Every adapter of CONFIGS, and `pfeiffer` and `stranger`, which have another form and another base."""
    tmp = tmp_path_factory.mktemp("merge")
    store = Store(str(tmp / "root"))
    digest = base_model.resolve(BaseSpec(uri=str(base))).digest
    for seed, (task, config) in enumerate(CONFIGS.items()):
        folder = engines.write_peft(base, tmp / task, seed, config)
        known = facts(base_digest=digest, prompt={"system": None} if task == "steady" else {"system": "Answer."})
        artifact.publish(store, task, folder, **known, alias="latest")
    bottleneck = engines.write_bottleneck(base, tmp / "pfeiffer", 9)
    artifact.publish(store, "pfeiffer", bottleneck, **facts(base_digest=digest), alias="latest")
    artifact.publish(store, "stranger", tmp / "card", **facts(), alias="latest")
    return store


def deltas(store: Store, manifest: AdapterManifest) -> Deltas:
    """Scale times B A of each module, in double precision."""
    folder = artifact.fetch(store, manifest.task, manifest.version)
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = {
        name: tensor.astype(np.float64) for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    modules = {name.partition(".lora_")[0] for name in tensors}
    return {m: scale * tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"] for m in modules}


def summed(store: Store, weights: dict[str, float]) -> Deltas:
    total: Deltas = {}
    for task, weight in weights.items():
        for module, delta in deltas(store, resolve(store, f"{task}@latest")).items():
            total[module] = total.get(module, np.zeros_like(delta)) + weight * delta
    return total


def merged(store: Store, weights: dict[str, float], method: str, rank: int | None = None, **more: Any) -> Merged:
    spec = MergeSpec.create(
        method, len(weights), list(weights.values()), more.get("density"), rank, more.get("seed", 0)
    )
    return merge_published(store, "both", [f"{task}@latest" for task in weights], spec)


@pytest.mark.parametrize("weights", [{"card": 0.7, "agent": -0.5}, {"card": 1, "agent": 1, "steady": 2}])
@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 10)])
def test_a_sum_is_the_sum_of_the_deltas(store: Store, weights: dict[str, float], method: str, rank: int | None) -> None:
    done = merged(store, weights, method, rank)
    wanted, found = summed(store, weights), deltas(store, done.manifest)
    assert found.keys() == wanted.keys()
    for module, delta in found.items():
        np.testing.assert_allclose(delta, wanted[module], atol=2e-5)
    assert done.distance < 1e-5
    assert done.rank == (rank or sum(CONFIGS[task].r for task in weights))


def test_a_lower_rank_is_the_nearest_one(store: Store) -> None:
    done = merged(store, {"card": 1, "agent": 1}, "svd", 3)
    off, whole = 0.0, 0.0
    wanted = summed(store, {"card": 1, "agent": 1})
    for module, delta in deltas(store, done.manifest).items():
        u, s, v = np.linalg.svd(wanted[module], full_matrices=False)
        np.testing.assert_allclose(delta, u[:, :3] * s[:3] @ v[:3], atol=2e-5)
        off, whole = off + float((s[3:] ** 2).sum()), whole + float((s**2).sum())
    assert done.distance == pytest.approx(math.sqrt(off / whole), rel=1e-4)


def test_linear_adds_the_factors_which_is_not_the_sum(store: Store) -> None:
    """PEFT's rule, by hand: A and B each with the root of weight times scale."""
    done = merged(store, {"card": 0.5, "agent": 0.5}, "linear")
    sides: dict[str, list[NDArray[np.float64]]] = {}
    for task, scale in (("card", 2.0), ("agent", 1.0)):
        folder = artifact.fetch(store, task, resolve(store, f"{task}@latest").version)
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            sides.setdefault(name, []).append(math.sqrt(0.5 * scale) * tensor.astype(np.float64))
    for module, delta in deltas(store, done.manifest).items():
        a, b = (np.sum(sides[f"{module}.lora_{side}.weight"], axis=0) for side in "AB")
        np.testing.assert_allclose(delta, b @ a, atol=2e-5)
    assert done.distance > 0.3, "q_proj, which both change, has the products of one's B with the other's A"


@pytest.mark.parametrize(
    "method", ["ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_linear_svd"]
)
def test_pruning_drops_entries_and_a_seed_decides_which(store: Store, method: str) -> None:
    both = {"card": 1.0, "agent": 1.0}
    done = merged(store, both, method, density=0.4)
    again = merged(store, both, method, density=0.4)
    assert done.manifest.version == again.manifest.version
    assert done.distance > 0.01
    other = merged(store, both, method, density=0.4, seed=1)
    assert (other.manifest.version != done.manifest.version) == method.startswith("dare")


def test_nothing_pruned_is_the_plain_merge(store: Store) -> None:
    both = {"card": 1.0, "agent": 1.0}
    plain = deltas(store, merged(store, both, "linear").manifest)
    for method in ("dare_linear", "magnitude_prune"):
        for module, delta in deltas(store, merged(store, both, method, density=1.0).manifest).items():
            np.testing.assert_allclose(delta, plain[module], atol=2e-5)


def test_a_merged_adapter_is_served(store: Store, base: Path) -> None:
    done = merged(store, {"card": 1.0, "steady": 1.0}, "cat")
    folder = artifact.fetch(store, "both", done.manifest.version)
    prompt = [5, 6, 7, 8]
    engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
    engine.load_adapter("both", folder)
    engine.start()
    try:
        (said,) = engines.ask(engine, engines.request("one", prompt, "both", max_new_tokens=8))
    finally:
        engine.stop()
    assert [said.tokens] == engines.peft_greedy(base, folder, [prompt], 8)
    assert [said.tokens] != engines.peft_greedy(base, None, [prompt], 8)


def test_its_ancestry_is_told(store: Store) -> None:
    words = ["adapters", "merge", "pair", "card@latest", "agent@latest", "--weights", "0.25,0.75", "--root", store.uri]
    told = CliRunner().invoke(app, words, catch_exceptions=False).output
    card, agent = (resolve(store, f"{task}@latest").ref for task in ("card", "agent"))
    assert f"= 0.25 {card} + 0.75 {agent}" in told
    assert "by cat, rank 8; 0.00% away" in told
    folder = artifact.fetch(store, "pair", resolve(store, "pair@latest").version)
    below = resolve(store, "pair@latest")
    grown = artifact.publish(
        store, "grown", folder, **facts(base_digest=below.base_digest, prompt={}), parent=below.ref, alias="latest"
    )
    shown = CliRunner().invoke(app, ["adapters", "show", "grown@latest", "--root", store.uri], catch_exceptions=False)
    family = json.loads(shown.output)["ancestry"]
    assert (family["ref"], family["made"]) == (grown.ref, "trained: sft, lora, going on")
    (pair,) = family["from"]
    assert (pair["ref"], pair["made"]) == (below.ref, "merged by cat, weights 0.25, 0.75")
    assert [one["ref"] for one in pair["from"]] == [card, agent]
    assert family["base"]["digest"] == below.base_digest


@pytest.mark.parametrize(
    ("refs", "method", "said"),
    [
        (["card", "stranger"], "cat", "deltas of different bases have no sum"),
        (["card", "steady"], "linear", r"ranks differ: (.|\n)*--method cat or svd"),
        (["card", "steady"], "ties", "--method ties_svd"),
        (["card", "dora"], "cat", "DoRA's magnitudes are no part of a sum"),
        (["card", "pfeiffer"], "cat", "it is BOTTLENECK"),
    ],
)
def test_what_has_no_sum_is_refused(store: Store, refs: list[str], method: str, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        merged(store, dict.fromkeys(refs, 1.0), method)


@pytest.mark.parametrize(
    ("method", "weights", "density", "rank", "said"),
    [
        ("mean", [1, 1], None, None, "methods are cat, svd"),
        ("cat", [1], None, None, "1 weights for 2 adapters"),
        ("cat", [0, 0], None, None, "something must be left"),
        ("cat", [1, 1], 0.5, None, "it is of ties"),
        ("ties", [1, 1], 1.5, None, "a share above 0"),
        ("ties", [1, 1], None, 4, "the methods that end in svd"),
    ],
)
def test_options_that_take_no_effect_are_refused(
    method: str, weights: list[float], density: float | None, rank: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        MergeSpec.create(method, 2, weights, density, rank, 0)


def test_different_prompts_are_told(store: Store) -> None:
    done = merged(store, {"card": 1.0, "steady": 1.0}, "cat")
    assert done.manifest.prompt["system"] is None
    assert "an arm sets its own" in done.notes[0]
