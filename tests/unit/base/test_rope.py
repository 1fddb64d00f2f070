"""RoPE scaling of a base: set before the model is built, part of its digest, and of what an adapter fits."""

from pathlib import Path

import pytest
import torch

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest, build_manifest
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.errors import ArtifactError, BaseModelError
from graftwork.quantization import QuantSpec
from tests.adapters import facts
from tests.tiny import write_tiny_base

PLAIN = QuantSpec(kind="none", dtype="float32")
YARN = {"kind": "yarn", "factor": 4, "original": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def base(folder: Path, rope: object = None) -> BaseSpec:
    return BaseSpec.model_validate({"uri": str(folder), "rope_scaling": rope})


def manifest(digest: str) -> AdapterManifest:
    made = {"sha256": "0" * 64, "size_bytes": 1}
    files = {"adapter_config.json": made, "adapter_model.safetensors": made}
    return build_manifest(
        "support", {**facts(base_digest=digest), "files": files, "created_at": "2026-01-01T00:00:00Z"}
    )


def test_yarn_is_set_before_load_and_gives_transformers_own_frequencies(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    resolved = base_model.resolve(base(folder, YARN))
    assert resolved.config["max_position_embeddings"] == 256
    ours = base_model.load(resolved, PLAIN, device="cpu", purpose="serve").model
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config.max_position_embeddings = 256
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    assert torch.equal(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain = base_model.load(base_model.resolve(base(folder)), PLAIN, device="cpu", purpose="serve").model
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert not torch.equal(ours(ids).logits, plain(ids).logits)


def test_the_digest_tells_the_scaling_and_adapters_of_another_one_are_refused_with_it(folder: Path) -> None:
    plain, yarn, linear = (
        base_model.resolve(base(folder, rope)).digest for rope in (None, YARN, {"kind": "linear", "factor": 2})
    )
    assert (yarn, linear) == (f"{plain}.yarn-4-of-64", f"{plain}.linear-2-of-2048")
    artifact.require_base(manifest(yarn), yarn)
    with pytest.raises(ArtifactError, match="trained with RoPE scaling yarn-4-of-64, this base has none"):
        artifact.require_base(manifest(yarn), plain)
    with pytest.raises(ArtifactError, match="trained with RoPE scaling none, this base has linear-2-of-2048"):
        artifact.require_base(manifest(plain), linear)
    with pytest.raises(ArtifactError, match="it was trained on base bbbb"):
        artifact.require_base(manifest("b" * 64), plain)
    assert manifest(yarn).version != manifest(plain).version


def test_a_base_that_is_scaled_already_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="share one plain RoPE"):
        base_model.resolve(base(tmp_path, YARN))
