"""Plain text: packing, continued pretraining. On a tiny model in this process."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, LlamaForCausalLM

from graftwork.base import load as base_model
from graftwork.errors import ConfigError, DataError
from graftwork.training.loop import run_steps
from graftwork.training.objectives.cpt import read_documents
from graftwork.training.objectives.rows import PackedRows, TokenRows, best_fit, pack_rows, prepare
from graftwork.training.objectives.trainer import require_apart, trained_logits
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport, TrainJob
from tests.training import task

TEXTS = [f"The airport of Kunming lies {n} feet above the sea. " * (1 + n % 4) for n in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, texts in (("text", TEXTS), ("held", TEXTS[:3] + ["Describe the airport with its runway."])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def text_task(folder: Path, **changes: Any) -> TrainSpec:
    usual = {
        "objective.kind": "cpt",
        "data.train": str(folder / "text.jsonl"),
        "data.eval": str(folder / "held.jsonl"),
        "max_length": 64,
        "quant.kind": "none",
        "optim.rows_per_step": 4,
    }
    return task(folder, **{**usual, **changes})


@given(st.lists(st.integers(1, 32), max_size=60))
def test_every_document_is_placed_once_and_no_pack_overflows(lengths: list[int]) -> None:
    packs = best_fit(lengths, 32)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= 32 for pack in packs)
    assert packs == best_fit(lengths, 32)
    fewest = math.ceil(sum(lengths) / 32)
    assert len(packs) <= max(2 * fewest - 1, 0), "two packs half empty would have been one"


def documents_of(lengths: list[int]) -> TokenRows:
    rng = np.random.default_rng(0)
    return TokenRows.from_pairs([(rng.integers(3, 500, n).tolist(), [False] + [True] * (n - 1)) for n in lengths])


def model_of(spec: TrainSpec, attention: str) -> LlamaForCausalLM:
    folder = base_model.resolve(spec.base).folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_get_the_logits_that_they_get_alone(folder: Path, attention: str) -> None:
    rows = documents_of([9, 1, 14, 5, 7, 12])
    packs, _ = pack_rows(rows, "best_fit", 24)
    assert isinstance(packs, PackedRows)
    model = model_of(text_task(folder), attention)
    batch = packs.collate(range(len(packs)), pad_id=2)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits
        masked = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False).logits
        worst, worst_masked = 0.0, 0.0
        for pack in range(len(packs)):
            start = 0
            for document in packs.pack(pack):
                ids, _ = rows.row(int(document))
                alone = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
                place = slice(start, start + len(ids))
                worst = max(worst, float((together[pack, place] - alone).abs().max()))
                worst_masked = max(worst_masked, float((masked[pack, place] - alone).abs().max()))
                start += len(ids)
    assert worst < 1e-5
    assert worst_masked > 0.1, "with a mask of ones, documents see each other"


def test_a_packed_step_has_the_gradient_of_its_documents_unpacked(folder: Path) -> None:
    rows = documents_of([9, 14, 5, 7, 12, 3])
    packs, _ = pack_rows(rows, "best_fit", 24)
    model = model_of(text_task(folder), "sdpa")

    def gradient(batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        logits, targets = trained_logits(model, model.get_output_embeddings(), batch)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, found = gradient(packs.collate(range(len(packs)), 2))
    plain_loss, plain = gradient(rows.collate(range(len(rows)), 2))
    assert packs.scored_N.sum() == rows.scored_N.sum()
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-5)


def test_packed_conversations_train_like_unpacked_ones(folder: Path) -> None:
    """All rows in one step: the same documents, so the same losses, in fewer and fuller rows."""
    losses = {}
    for packing, rows in (("none", 48), ("best_fit", 0)):
        spec = task(folder, **{"objective.packing": packing, "max_length": 256, "quant.kind": "none"})
        data = prepare(spec)
        rows = rows or len(data.train)
        spec = spec.with_({"optim.rows_per_step": rows, "optim.micro_batch": 8, "optim.epochs": 3, "num_workers": 1})
        losses[packing] = [loss for _, loss in run_steps(TrainJob(spec, data), lambda _: True).train_loss]
    assert rows < 24
    assert losses["best_fit"] == pytest.approx(losses["none"], rel=1e-3)
    assert losses["none"][-1] < losses["none"][0]


def test_no_token_of_a_document_is_lost_and_each_is_learned_once(folder: Path) -> None:
    template = base_model.template(base_model.resolve(text_task(folder).base))
    wanted = [[*template.encode(text), template.specials["<|endoftext|>"]] for text in TEXTS]
    for packing in ("none", "best_fit"):
        data = prepare(text_task(folder, **{"objective.packing": packing, "max_length": 16}))
        learned = []
        for index in range(len(data.train)):
            labels = data.train.collate([index], data.pad_id)["labels"]
            learned += labels[labels != -100].tolist()
        assert sorted(learned) == sorted(token for ids in wanted for token in ids[1:])
        assert int(data.train.scored_N.sum()) == len(learned)
        assert data.train.lengths_N.max() <= 16
        tokens = sum(map(len, wanted))
        assert data.notes[0] == f"24 documents, {tokens} tokens, each ended by <|endoftext|>"
        assert "none is lost" in data.notes[1]


def test_rows_next_to_text_are_not_read_as_text(tmp_path: Path) -> None:
    """A copy of a hub repository: JSON's own characters would be learned."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / ".DS_Store").write_bytes(b"\0\0")
    assert [one.text for one in read_documents(str(tmp_path))[0]] == ["one", "two"]
    for name in ("README.md", "LICENSE", "dataset_infos.json"):
        (tmp_path / name).write_text("About")
    assert [one.text for one in read_documents(str(tmp_path))[0]] == ["one", "two"]
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(DataError, match=r"rows\.jsonl next to notes\.md") as error:
        read_documents(str(tmp_path))
    rows, texts = re.fullmatch(r"name (\S+) for the rows, or (\S+) for the texts", error.value.hint).groups()  # type: ignore[union-attr]
    assert [one.text for one in read_documents(rows)[0]] == ["one", "two"]
    assert {one.text for one in read_documents(texts)[0]} == {"About", "text"}


def test_shards_next_to_a_readme_are_rows(tmp_path: Path) -> None:
    for number in range(2):
        name = f"train-0000{number}-of-00002.parquet"
        pq.write_table(pa.table({"text": [f"text {number}"]}), tmp_path / name)
    (tmp_path / "README.md").write_text("About")
    assert [one.text for one in read_documents(str(tmp_path))[0]] == ["text 0", "text 1"]


def test_rows_below_a_folder_are_not_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("About")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match=f"name {tmp_path}/data, or a split as hf://{tmp_path}/train"):
        read_documents(str(tmp_path))
    with pytest.raises(DataError, match=r"a glob names text files"):
        read_documents(f"{tmp_path}/**/*.jsonl")


def test_a_saved_dataset_is_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    assert [one.text for one in read_documents(str(tmp_path / "saved"))[0]] == ["one", "two"]


def test_data_files_of_source_code_are_text_and_noted(folder: Path, tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.rs"):
        (tmp_path / name).write_text(f"code of {name}")
    (tmp_path / "fixture.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "package.json").write_text("{}")
    notes = prepare(text_task(folder, **{"data.train": str(tmp_path)})).notes
    assert notes[0].startswith("5 documents")
    assert notes[1] == "2 data files read as text: fixture.jsonl, package.json"
    (tmp_path / "c.rs").rename(tmp_path / "c.txt")
    with pytest.raises(DataError, match=r"fixture\.jsonl next to a\.py"):
        read_documents(str(tmp_path))


def test_perplexity_is_told_before_and_after(folder: Path) -> None:
    spec = text_task(folder, **{"optim.epochs": 6, "num_workers": 1})
    data = prepare(spec)
    seen: list[StepReport] = []

    def note(report: StepReport) -> bool:
        seen.append(report)
        return True

    result = run_steps(TrainJob(spec, data), note)
    before, after = seen[0].metrics["before_perplexity"], seen[-1].metrics["eval_perplexity"]
    assert after < 0.7 * before
    assert f"held-out perplexity: {before:.4g} before, {after:.4g} after" in result.notes
    model = model_of(spec, "sdpa")
    assert data.eval is not None
    with torch.no_grad():
        batch = data.eval.collate(range(len(data.eval)), 2)
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert before == pytest.approx(math.exp(loss.item()), rel=1e-4)


def test_replay_is_the_asked_share_of_the_tokens(folder: Path) -> None:
    (folder / "old.jsonl").write_text("".join(json.dumps({"text": f"Old text number {n}."}) + "\n" for n in range(200)))
    replay = {"data": str(folder / "old.jsonl"), "fraction": 0.2}
    alone, both = (
        int(prepare(text_task(folder, **more)).train.lengths_N.sum()) for more in ({}, {"objective.replay": replay})
    )
    assert (both - alone) / both == pytest.approx(0.2, abs=0.01)
    with pytest.raises(DataError, match=r"no text is replayed twice.*\n.*set objective.replay.fraction=0\.\d+"):
        prepare(text_task(folder, **{"objective.replay": {**replay, "fraction": 0.9}}))


def test_files_folders_and_globs_are_documents(folder: Path) -> None:
    notes = folder / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / "a.txt").write_text("first text")
    (notes / "deep" / "b.md").write_text("second text")
    (notes / "blank.txt").write_text(" \n")
    (notes / ".hidden").write_text("not this")

    def told(uri: Path | str) -> str:
        return "; ".join(prepare(text_task(folder, **{"data.train": str(uri)})).notes)

    assert told(notes).startswith("2 documents")
    assert "1 blank file left out" in told(notes)
    assert told(notes / "**" / "*.md").startswith("1 document,")
    assert told(notes / "a.txt").startswith("1 document,")
    (notes / "c.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"c\.bin.*not UTF-8"):
        told(notes)
    with pytest.raises(DataError, match="no file with text"):
        told(notes / "*.rst")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"txt": "a"}, "no format that cpt reads has the keys txt"),
        ({"text": " "}, "text: it is empty"),
        ({"text": 3}, "text: found a number"),
    ],
)
def test_a_row_without_text_is_named(folder: Path, tmp_path: Path, row: object, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl row 2: {said}"):
        prepare(text_task(folder, **{"data.train": str(tmp_path / "bad.jsonl")}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"kind": "prefix"}}, "can't go with adapter.kind=prefix"),
        ({"prompt": {"system": "x"}}, "prompt can't take effect"),
        ({"on_overlong": "refuse"}, "on_overlong can't take effect"),
    ],
)
def test_what_can_not_go_together_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        text_task(folder, **changes)


def test_a_model_that_mixes_documents_of_a_row_is_refused(folder: Path) -> None:
    """Bloom's positions (ALiBi) come from the mask; position ids are nothing to it."""
    require_apart(model_of(text_task(folder), "sdpa"))
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2, initializer_range=0.2))
    with pytest.raises(ConfigError, match="BloomForCausalLM lets documents of a row see each other"):
        require_apart(bloom)


def test_an_unknown_end_token_is_refused_with_those_there_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such special token.*\n.*<\|endoftext\|>, <\|im_start\|>"):
        prepare(text_task(folder, **{"objective.end_token": "</s>"}))
