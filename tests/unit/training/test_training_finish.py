"""What follows publishing: it never fails a run, names what is missing, and a rerun makes it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from graftwork.artifacts.registry import resolve
from graftwork.storage.store import Store
from graftwork.training.loop import run_steps
from graftwork.training.run import ResolvedRun, _job, _publish_result, _write_run_inputs, _write_status, train
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import read_steps
from tests.tiny import VOCAB_SIZE, write_tiny_tokenizer
from tests.training import task


def publish(spec: TrainSpec) -> ResolvedRun:
    """Train a spec in this process up to its status `finished`: all that `train` does on Ray before the page."""
    run = ResolvedRun.resolve(spec).with_auto_resolved()
    _write_run_inputs(run)
    result = run_steps(_job(run, None), report=lambda _: True)
    _write_status(run.paths, "finished", report=_publish_result(run, result, read_steps(run.paths)).as_dict())
    return run


def gpt2(folder: Path, **changes: Any) -> TrainSpec:
    """`task` on a tiny GPT-2, whose config.json has none of the keys of the closed-form plan."""
    base = folder / "gpt2"
    write_tiny_tokenizer(base)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=2
        )
    ).save_pretrained(base)
    return task(folder, **{"base": str(base), "quant.kind": "none", "num_workers": 1, "optim.epochs": 0.5, **changes})


def test_a_base_without_a_closed_form_is_trained_published_and_has_its_page(tmp_path: Path) -> None:
    spec = gpt2(tmp_path)
    run = publish(spec)
    first = train(spec)
    assert (first.reused, first.adapter) == (True, f"colours@{first.version}")
    assert resolve(Store(spec.root), "colours@latest").version == first.version
    assert run.paths.store.read_json(*run.paths.status())["state"] == "finished"
    page = Path(first.page).read_text(encoding="utf-8")
    if missing := [note for note in first.notes if note.startswith("no prediction of memory")]:
        assert missing[0].partition(":")[0] in page, "the page says it too"
    again = train(spec)
    assert (again.version, again.page) == (first.version, first.page)


def test_a_page_that_cannot_be_written_is_a_warning_and_the_rerun_writes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = task(tmp_path, num_workers=1)
    run = publish(spec)
    blocked = Path(run.paths.store.path(*run.paths.file("report.json")))
    (blocked / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "graftwork"):
        found = train(spec)
    [warning] = [note for note in found.notes if note.startswith("warning:")]
    assert "report.html could not be made" in warning
    assert "the run is published" in warning
    assert found.page == ""
    assert not caplog.records, "one warning, in the report, and no traceback"
    (blocked / "in the way").rmdir()
    blocked.rmdir()
    healed = train(spec)
    assert not [note for note in healed.notes if note.startswith("warning:")]
    assert json.loads(Path(healed.page).with_suffix(".json").read_text())["train"]
