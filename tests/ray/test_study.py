"""A whole study on a private Ray and a tiny base: trained, asked, weighed, judged; a rerun asks nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.studies.run import check_study, run_study
from examples.studies.schema import StudyReport
from examples.studies.spec import StudySpec
from graftwork.cluster.session import Session
from graftwork.errors import ArtifactError
from graftwork.storage.store import Store
from tests.tiny import write_tiny_base

QUESTIONS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows of both kinds, and the train spec that the study names."""
    folder = tmp_path_factory.mktemp("study")
    write_tiny_base(folder / "base")
    turns = [{"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": '{"colour":"red"}'}]
    rows = [
        {"id": f"q{n}", "doc_id": f"d{n % 2}", "size": n % 2, "messages": turns, "gold": {"colour": "red"}}
        for n in range(QUESTIONS)
    ]
    weighed = [
        {**row, "messages": turns[:1], "gold": {"choices": ['{"colour":"red"}', "zebra"], "right": 0}} for row in rows
    ]
    for name, records in (("rows", rows), ("weighed", weighed)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    schema = {"type": "object", "required": ["colour"]}
    (folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    train = {
        "kind": "train",
        "name": "other",
        "base": "elsewhere",
        "data": {"train": str(folder / "rows.jsonl")},
        "optim": {"lr": 0.02, "epochs": 4, "rows_per_step": 2, "warmup_ratio": 0},
        "num_workers": 1,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(train), encoding="utf-8")
    return folder


def spec(folder: Path, **changed: Any) -> StudySpec:
    arms = [{"name": "base", "max_new_tokens": 8}, {"name": "tuned", "adapter": "colours@latest", "max_new_tokens": 8}]
    sides = {"a": "tuned", "b": "base"}
    tree = {
        "name": "tiny",
        "title": "Tiny",
        "paper": "Nothing",
        "root": str(folder / "root"),
        "base": str(folder / "base"),
        "quant": {"kind": "none", "dtype": "float32"},
        "num_cpus": 1,
        "adapters": [{"file": "train.yaml", "set": {"name": "colours"}}],
        "measures": [
            {
                "name": "asked",
                "eval": str(folder / "rows.jsonl"),
                "answer_schema": str(folder / "schema.json"),
                "by": "size",
                "metrics": ["facts", "form"],
                "arms": arms,
            },
            {
                "name": "weighed",
                "kind": "likelihood",
                "eval": str(folder / "weighed.jsonl"),
                "unit": "doc_id",
                "metrics": ["nats", "choice"],
                "arms": arms,
            },
        ],
        "claims": [
            {**sides, "statement": "it is likelier", "metric": "nats", "measure": "weighed", "expect": "lower"},
            {**sides, "statement": "it knows more", "metric": "facts", "expect": "higher", "of": 1},
        ],
    }
    return StudySpec.model_validate({**tree, **changed})


@pytest.mark.long
def test_a_study_runs_from_its_file_to_its_page_and_is_free_the_second_time(ray_cluster: Session, folder: Path) -> None:
    adapters = check_study(spec(folder), folder)
    assert [(one.name, one.root, one.base.uri) for one in adapters] == [
        ("colours", str(folder / "root"), str(folder / "base"))
    ]
    first = run_study(spec(folder), adapters, ray_cluster, quiet=True)
    report = first.report
    [trained] = report.adapters
    nats = {score.arm: score.value for score in report.measures[1].scores if score.metric == "nats"}
    assert nats["tuned"] < nats["base"] - 0.5, "twelve steps on this very answer"
    assert report.claims[0].value == pytest.approx(nats["tuned"] - nats["base"])
    assert report.claims[0].outcome == "undecided", "two documents decide nothing"
    assert (report.measures[0].units, report.measures[1].units) == (QUESTIONS, 2)
    assert {score.group for score in report.measures[0].scores} == {"", "0", "1"}
    signatures = [score.signature for score in report.measures[0].scores if score.arm == "tuned"]
    assert all(f"adapter:colours@{trained.version}" in one for one in signatures), "the version, not the alias"

    store = Store(str(folder / "root"))
    kept = store.read_json("runs", Path(first.json_uri).parent.name, "study.json")
    assert StudyReport.model_validate(kept) == report
    lines = {path: path.read_text() for path in (folder / "root" / "runs").rglob("*.jsonl")}
    again = run_study(spec(folder), adapters, ray_cluster, quiet=True)
    assert again.report == report
    assert {path: path.read_text() for path in (folder / "root" / "runs").rglob("*.jsonl")} == lines


def test_an_adapter_that_nobody_trained_is_named(ray_cluster: Session, folder: Path) -> None:
    missing = spec(folder, adapters=[], name="missing", root=str(folder / "empty"))
    with pytest.raises(ArtifactError, match="colours"):
        run_study(missing, check_study(missing, folder), ray_cluster, quiet=True)
