"""Infilling on a tiny model: layouts, sentinels by tokenizer, trained rows served as PEFT computes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from graftwork.base import load as base_model
from graftwork.errors import ArtifactError, ConfigError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.loop import run_steps
from graftwork.training.objectives.fim import cut_anywhere, cut_line
from graftwork.training.objectives.rows import AnsweredRows, prepare
from graftwork.training.objectives.trainer import edit_similarity
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import StepReport, TrainJob
from tests import engines
from tests.training import task

NAMED = {"prefix": "<|fim_a|>", "suffix": "<|fim_b|>", "middle": "<|fim_c|>"}
CODE = [f"name = '{n}'\nname = name.city\nprint(name, {n % 3})\n" for n in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fim")
    for name, texts in (("code", CODE), ("held", CODE[:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def fim_task(folder: Path, **changes: Any) -> TrainSpec:
    usual = {
        "objective.kind": "fim",
        "data.train": str(folder / "code.jsonl"),
        "data.eval": str(folder / "held.jsonl"),
        "base": {"uri": str(folder / "base"), "extra_tokens": 3},
        "quant.kind": "none",
        "num_workers": 1,
    }
    return task(folder, **{**usual, **changes})


@given(st.text(max_size=80), st.integers(0, 2**32 - 1), st.booleans())
def test_the_parts_of_a_cut_are_the_document(text: str, seed: int, line: bool) -> None:
    cut = (cut_line if line else cut_anywhere)(text, np.random.default_rng(seed))
    assert "".join(cut) == text


def test_a_held_out_middle_is_one_line_without_its_indent() -> None:
    text = "def f():\n    a = 1\n\n    return a\n"
    middles = {cut_line(text, np.random.default_rng(seed))[1] for seed in range(20)}
    assert middles == {"a = 1", "return a"}


@pytest.mark.parametrize(("spm", "loss_on"), [(0.0, "all"), (1.0, "middle")])
def test_layouts_are_those_of_the_paper(folder: Path, spm: float, loss_on: str) -> None:
    spec = fim_task(folder, **{"objective.spm_share": spm, "objective.rate": 1, "objective.loss_on": loss_on})
    template, data = base_model.template(base_model.resolve(spec.base)), prepare(spec)
    pre, suf, mid = data.trained_tokens
    assert (pre, suf, mid) == (512, 513, 514), "behind the 512 of the tokenizer"
    for index, text in enumerate(CODE):
        batch = data.train.collate([index], data.pad_id)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert ids[-1] == template.specials["<|endoftext|>"]
        parts = {}
        marks = [(ids.index(mark), name) for mark, name in ((pre, "pre"), (suf, "suf"), (mid, "mid"))]
        for (at, name), (end, _) in zip(marks, [*sorted(marks)[1:], (len(ids) - 1, "")], strict=False):
            parts[name] = template.decode(ids[at + 1 : end])
        if spm:
            assert ids[:2] == [pre, suf]
            assert text.endswith(parts["suf"])
            assert parts["mid"] + parts["suf"] == text, "prefix and middle in one"
            assert labels[: ids.index(mid) + 1] == [-100] * (ids.index(mid) + 1), "loss on the middle alone"
        else:
            assert parts["pre"] + parts["mid"] + parts["suf"] == text
            assert [token for token, label in zip(ids, labels, strict=True) if label == -100] == [pre, suf, mid]


def test_a_middle_of_one_line_where_asked(folder: Path) -> None:
    spec = fim_task(folder, **{"objective.cut": "line", "objective.rate": 1, "objective.loss_on": "middle"})
    template, data = base_model.template(base_model.resolve(spec.base)), prepare(spec)
    for index, text in enumerate(CODE):
        labels = data.train.collate([index], data.pad_id)["labels"][0]
        middle = template.decode([int(label) for label in labels if label != -100][:-1])
        assert middle in [line.strip() for line in text.splitlines()[1:]]


def add_special(folder: Path, target: Path, names: list[str]) -> Path:
    """The tiny base with some of its ordinary tokens turned into special ones of these names."""
    import shutil

    shutil.copytree(folder / "base", target)
    path = target / "tokenizer.json"
    model = json.loads(path.read_text())
    last = max(model["model"]["vocab"].values())
    by_id = {number: piece for piece, number in model["model"]["vocab"].items()}
    for number, name in enumerate(names):
        piece = by_id[last - number]
        model["model"]["merges"] = [pair for pair in model["model"]["merges"] if "".join(pair) != piece]
        del model["model"]["vocab"][piece]
        model["model"]["vocab"][name] = last - number
        model["added_tokens"].append(
            {
                "id": last - number,
                "content": name,
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
        )
    path.write_text(json.dumps(model))
    return target


def test_sentinels_are_the_bases_own_or_named_or_refused(folder: Path, tmp_path: Path) -> None:
    task(folder)
    own = add_special(folder, tmp_path / "own", ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    data = prepare(fim_task(folder, base=str(own)))
    assert (data.trained_tokens, data.notes[0].split("; ")[1]) == (
        (),
        "sentinels <fim_prefix> <fim_suffix> <fim_middle>: the base knows them",
    )
    named = add_special(folder, tmp_path / "named", list(NAMED.values()))
    data = prepare(fim_task(folder, base=str(named), **{"objective.sentinels": NAMED}))
    assert data.trained_tokens == (511, 510, 509)
    with pytest.raises(ConfigError, match=r"0 rows beyond it.*\n.*\n.*base.extra_tokens=3, or name .*<\|fim_a\|>"):
        prepare(fim_task(folder, base=str(named)))
    with pytest.raises(ConfigError, match=r"no such special token"):
        prepare(fim_task(folder, **{"objective.sentinels": NAMED}))
    taken = {**NAMED, "suffix": "<|im_end|>"}
    with pytest.raises(ConfigError, match=r"it ends an answer"):
        prepare(fim_task(folder, base=str(named), **{"objective.sentinels": taken}))
    with pytest.raises(ConfigError, match=r"adapter.kind=ia3: the base has not learned its sentinels"):
        prepare(fim_task(folder, adapter={"kind": "ia3"}))
    with pytest.raises(ConfigError, match="three different tokens"):
        fim_task(folder, **{"objective.sentinels": {"prefix": "<|im_start|>"}})


def test_middles_are_learned_and_the_adapter_is_served_as_peft_computes_it(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    spec = fim_task(
        folder,
        **{
            "optim.epochs": 25,
            "optim.lr": 1e-2,
            "objective.rate": 1,
            "objective.spm_share": 0,
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "objective.packing": "best_fit",
            "max_length": 128,
            "optim.rows_per_step": 2,
        },
    )
    data = prepare(spec)
    run = RunPaths(Store(str(tmp_path)), "fim", "0" * 64)
    seen: list[StepReport] = []

    def note(report: StepReport) -> bool:
        seen.append(report)
        return True

    result = run_steps(TrainJob(spec, data, run), note)
    before, after = seen[0].metrics, seen[-1].metrics
    assert after["eval_edit_similarity"] > before["before_edit_similarity"] + 0.2
    assert any(note.startswith("held-out exact match: 0 before, ") for note in result.notes)
    with Checkpoints(run).model_files(result.steps) as adapter:
        held = load_file(adapter / "adapter_model.safetensors")
        rows = [tensor for name, tensor in held.items() if "trainable_tokens_delta" in name]
        assert {tuple(tensor.shape) for tensor in rows} == {(3, 64)}, held.keys()
        assert not any("embed_tokens.weight" in name or "lm_head.weight" in name for name in held)
        resolved = base_model.resolve(spec.base)
        model = base_model.load(resolved, spec.quant, device="cpu", purpose="serve").model
        served = base_model.load(resolved, spec.quant, device="cpu", purpose="serve").model
        engine = NativeEngine(served, engines.spec(), "cpu")
        try:
            engine.load_adapter("fim", adapter)
            engine.start()
            peft = PeftModel.from_pretrained(model, adapter).eval()
            assert isinstance(data.eval, AnsweredRows)
            for index in range(3):
                prompt = data.eval.prompt(index)
                out = peft.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
                asked = engines.request(f"middle {index}", prompt, "fim", max_new_tokens=12)
                assert engines.ask(engine, asked)[0].tokens == out[0, len(prompt) :].tolist()
        finally:
            engine.stop()


def test_an_adapter_of_a_grown_base_is_refused_elsewhere(folder: Path) -> None:
    from graftwork.artifacts import publish as artifact
    from tests.unit.base.test_rope import manifest

    grown = base_model.resolve(fim_task(folder).base)
    plain = base_model.resolve(task(folder).base)
    assert grown.digest == f"{plain.digest}.rows-3"
    artifact.require_base(manifest(grown.digest), grown.digest)
    with pytest.raises(ArtifactError, match=r"base.extra_tokens=3, this base has 0"):
        artifact.require_base(manifest(grown.digest), plain.digest)


@pytest.mark.parametrize(
    ("said", "right", "wanted"), [("return x", "return x", 1.0), ("", "abc", 0.0), ("kitten", "sitting", 1 - 3 / 7)]
)
def test_edit_similarity(said: str, right: str, wanted: float) -> None:
    assert edit_similarity(said, right) == pytest.approx(wanted)
