"""Local files of a spec: which keys name them, what travels, what is refused, and whose identity it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.cluster.jobs import inputs
from graftwork.cluster.jobs.inputs import path_findings, send, with_inputs
from graftwork.cluster.jobs.models import Attempt, Job
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.kuberay.preflight import preflight
from graftwork.config import SPEC_KINDS, Spec, spec_class, validate
from graftwork.datasets.rows import read_rows
from graftwork.errors import ConfigError, StorageError
from graftwork.retrieval.corpus import ChunkSpec, SourceSpec, read_corpus
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import ServeSpec
from graftwork.stages.jobs import job_of
from graftwork.storage.store import Store
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec
from tests.kuberay_objects import cluster
from tests.tiny import write_tiny_base

ROW = '{"prompt": "a", "completion": "b"}\n'
POD = "k8s:prod/team-a"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows, a schema, SQL and documents."""
    folder = tmp_path / "work"
    (folder / "docs" / "more").mkdir(parents=True)
    (folder / "rows.jsonl").write_text(ROW)
    (folder / "held-out.jsonl").write_text(ROW * 2)
    (folder / "more.jsonl").write_text(ROW * 3)
    (folder / "schema.json").write_text('{"type": "object"}')
    (folder / "setup.sql").write_text("create table t (a int);")
    (folder / "docs" / "a.md").write_text("# Runways\n\nThe runway is 3 km long.")
    (folder / "docs" / "more" / "b.md").write_text("# Towers\n\nThe tower is 40 m high.")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return folder


def train(**changes: Any) -> TrainSpec:
    tree = {"name": "cards", "base": "hub/base", "data": {"train": "rows.jsonl", "eval": "held-out.jsonl"}, **changes}
    return validate(TrainSpec, tree, "test")


def codes(spec: Spec, root: str = "s3://bucket/team-a", **places: bool) -> set[tuple[str, str]]:
    sent = with_inputs(spec, root).spec.model_dump(mode="json")
    return {(one.code, one.where) for one in path_findings(sent, shared=places.pop("shared", False), **places)}


def test_rows_travel_and_the_job_reads_the_copies(here: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    sent = with_inputs(train(), store.uri)
    assert isinstance(sent.spec, TrainSpec)
    assert {one.path.name for one in sent.inputs} == {"rows.jsonl", "held-out.jsonl"}
    assert not Path(store.uri).exists(), "nothing is written before preflight"
    for one in (*sent.inputs, *sent.inputs):  # the same file again is a no-op
        send(store, one)
    assert str(sent.spec.data.train).startswith(f"{store.uri}/inputs/")
    (here / "rows.jsonl").unlink()
    assert len(read_rows(sent.spec.data.source("train", 0), need="train")) == 1
    assert len(read_rows(sent.spec.data.source("eval", 0), need="train")) == 2
    assert codes(train(data={"train": "held-out.jsonl"})) == set()


def test_a_folder_of_documents_travels_as_it_is(here: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    arms = [{"name": "a", "retriever": {"corpus": "docs"}}, {"name": "b"}]
    spec = validate(
        CompareSpec,
        {
            "name": "c",
            "base": "hub/base",
            "eval": "rows.jsonl",
            "arms": arms,
            "baseline": "a",
            "answer_schema": "schema.json",
        },
        "test",
    )
    sent = with_inputs(spec, store.uri)
    for one in sent.inputs:
        send(store, one)
    assert isinstance(sent.spec, CompareSpec)
    retriever = sent.spec.arms[0].retriever
    assert retriever is not None
    source = SourceSpec(uri=retriever.corpus)
    assert "tower is 40 m" in " ".join(one.text for one in read_corpus([source], ChunkSpec()))
    assert len(sent.inputs) == 3


def test_the_identity_is_the_contents(here: Path) -> None:
    first, root = with_inputs(train(), "s3://bucket/a"), "s3://bucket/a"
    assert with_inputs(train(), "s3://other/b").identity == first.identity, "two stores, one job"
    (here / "copy.jsonl").write_text(ROW)
    same = with_inputs(train(data={"train": "copy.jsonl", "eval": str(here / "held-out.jsonl")}), root)
    assert same.identity == first.identity, "another path of the same rows"
    (here / "rows.jsonl").write_text(ROW * 3)
    assert with_inputs(train(), root).identity != first.identity, "other rows under the same path"
    far = train(data={"train": "s3://bucket/rows.jsonl"})
    assert with_inputs(far, root) == inputs.SentSpec(far, far.identity(), ())


def test_every_key_of_a_stage_that_names_a_file_travels(here: Path) -> None:
    specs: list[Spec] = [
        train(
            prompt={"shots": 1, "few_shot_file": "rows.jsonl"},
            data={"train": "rows.jsonl", "eval": "held-out.jsonl", "context": {"corpus": "docs/a.md"}},
        ),
        validate(
            TuneSpec,
            {
                "name": "sweep",
                "train": train().model_dump(mode="json", exclude_unset=True),
                "space": {"data.train": {"kind": "choice", "values": ["rows.jsonl", "more.jsonl"]}},
            },
            "test",
        ),
        validate(
            ServeSpec,
            {
                "name": "s",
                "base": "b",
                "arms": [
                    {
                        "name": "a",
                        "grammar": {"json_schema": "schema.json"},
                        "retriever": {"corpus": "docs"},
                        "prompt": {"shots": 1, "few_shot_file": "rows.jsonl"},
                    }
                ],
            },
            "test",
        ),
        validate(
            CompareSpec,
            {
                "name": "c",
                "base": "b",
                "eval": "rows.jsonl",
                "answer_schema": "schema.json",
                "arms": [{"name": "a"}, {"name": "b"}],
                "baseline": "a",
                "probes": {"corpus": "docs/a.md"},
                "scorers": [
                    {"kind": "sql", "setup": "setup.sql"},
                    {"kind": "json_schema", "json_schema": "schema.json"},
                ],
            },
            "test",
        ),
        validate(
            QuantizeSpec,
            {
                "name": "q",
                "base": "b",
                "eval": "rows.jsonl",
                "answer_schema": "schema.json",
                "text": {"uri": "docs/a.md"},
                "arms": [{"name": "a"}],
            },
            "test",
        ),
    ]
    for spec in specs:
        sent = with_inputs(spec, "s3://bucket/a").spec
        left = [
            value
            for _, value in inputs.texts_in(sent.model_dump(mode="json", exclude_unset=True))
            if "://" not in value and (here / value).exists()
        ]
        assert left == []
        assert list(path_findings(sent.model_dump(mode="json"), shared=False)) == []


def test_a_chat_template_travels_and_hermes_is_none(here: Path) -> None:
    (here / "own.jinja").write_text("{{ messages }}")
    sent = with_inputs(train(base={"uri": "hub/base", "chat_template": "own.jinja"}), "s3://bucket/a").spec
    assert isinstance(sent, TrainSpec)
    assert str(sent.base.chat_template).startswith("s3://bucket/a/inputs/")
    (here / "hermes").write_text("no template")
    named = train(base={"uri": "hub/base", "chat_template": "hermes"})
    kept = with_inputs(named, "s3://bucket/a").spec
    assert isinstance(kept, TrainSpec)
    assert kept.base.chat_template == "hermes"
    (here / "hermes").unlink()
    assert not any("chat_template" in where for _, where in codes(named))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def test_every_key_that_is_documented_as_a_path_is_known() -> None:
    """A new key that names a file is sent or named as a place, and not forgotten."""
    unknown: set[str] = set()
    seen: set[type[BaseModel]] = set()

    def walk(model: type[BaseModel], parent: str) -> None:
        for name, field in model.model_fields.items():
            said, text = field.description or "", "str" in str(field.annotation)
            names_file = text and any(word in said for word in ("a path", "`file://`", "JSONL", "A folder"))
            if (
                names_file
                and name not in inputs.INPUT_KEYS | inputs.PLACE_KEYS
                and (name != "uri" or parent not in {*inputs.INPUT_PARENTS, "base", "embedder"})
            ):
                unknown.add(f"{model.__name__}.{name}")
            for inner in models_in(field.annotation):
                if inner not in seen:
                    seen.add(inner)
                    walk(inner, name)

    for kind in set(SPEC_KINDS) - {"demo", "cluster"}:
        walk(spec_class(kind), kind)
    assert unknown == set()


def test_what_cannot_travel_is_refused_with_its_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_base(here / "base")
    assert codes(train(base="base/")) == {("E-PATH-LOCAL", "base.uri")}
    assert codes(train(base=str(base))) == {("E-PATH-LOCAL", "base.uri")}
    assert codes(train(base=str(base)), shared=True) == {("W-PATH-LOCAL", "base.uri")}
    assert codes(train(base="base/"), shared=True, here=True) == {("E-PATH-RELATIVE", "base.uri")}
    assert codes(train(data={"train": "none.jsonl"})) == {("E-PATH-ABSENT", "data.train")}
    assert codes(train(data={"train": "/only/there/rows.jsonl"})) == set(), "an absolute path may be the image's"
    assert codes(train(data={"train": "file:///only/there/rows.jsonl"})) == set()
    assert codes(train(data={"train": "base"})) == {("E-PATH-LOCAL", "data.train")}, "weights are no rows"
    monkeypatch.setattr(inputs, "MOST_BYTES", len(ROW))
    assert codes(train()) == {("E-PATH-TOO-LARGE", "data.eval")}
    monkeypatch.setattr(inputs, "MOST_BYTES", 2 * len(ROW))
    assert codes(train()) == {("E-PATH-LOCAL", "data.eval")}, "each has room, both together do not"


def test_a_file_over_the_limit_is_not_read(here: Path) -> None:
    with (here / "rows.jsonl").open("wb") as opened:
        opened.truncate(2**30 + 1)  # sparse
    assert with_inputs(train(), "s3://bucket/a").inputs[0].path.name == "held-out.jsonl"
    assert ("E-PATH-TOO-LARGE", "data.train") in codes(train())


def test_a_file_that_changes_while_it_is_sent_is_refused(here: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    [one] = with_inputs(train(data={"train": "rows.jsonl"}), store.uri).inputs
    (here / "rows.jsonl").write_text(ROW * 9)
    with pytest.raises(ConfigError, match="it changed while it was sent"):
        send(store, one)
    assert not store.exists(*one.key)


def test_several_sources_travel(here: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    sent = with_inputs(train(data={"train": [{"path": "rows.jsonl"}, {"path": "held-out.jsonl"}]}), store.uri)
    assert {one.path.name for one in sent.inputs} == {"rows.jsonl", "held-out.jsonl"}
    for one in sent.inputs:
        send(store, one)
    assert isinstance(sent.spec, TrainSpec)
    assert len(read_rows(sent.spec.data.source("train", 0), need="train")) == 3


def test_a_file_may_have_any_name(here: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    (here / "rows of #1 ü?.jsonl").write_text(ROW)
    sent = with_inputs(train(data={"train": "rows of #1 ü?.jsonl"}), store.uri)
    send(store, sent.inputs[0])
    assert isinstance(sent.spec, TrainSpec)
    assert str(sent.spec.data.train).endswith("/rows_of__1___.jsonl")
    assert len(read_rows(sent.spec.data.source("train", 0), need="train")) == 1


def test_preflight_of_pods_judges_what_is_left(here: Path) -> None:
    write_tiny_base(here / "base")

    def errors(spec: Spec, on: str) -> set[str]:
        job = job_of(spec, cluster(), on)
        return {one.code for one in preflight(Attempt(job, 1), "team-a") if one.level == "error"}

    assert errors(train(), POD) == set()
    assert errors(train(base="base/"), POD) == {"E-PATH-LOCAL"}
    assert errors(train(data={"train": "gone.jsonl"}), POD) == {"E-PATH-ABSENT"}
    spec = train().model_dump(mode="json")
    unsent = Job("cards", "train", "a" * 64, "s3://bucket/team-a", spec, cluster())
    found = [one for one in preflight(Attempt(unsent, 1), "team-a") if one.code == "E-PATH-LOCAL"]
    assert {one.where for one in found} == {"data.eval", "data.train"}, "a job that was made without its inputs"


@pytest.mark.parametrize("on", ["http://127.0.0.1:9", "k8s:nowhere/team-a"])
def test_a_plan_elsewhere_names_what_it_would_send(here: Path, on: str, tmp_path: Path) -> None:
    file = here / "train.yaml"
    file.write_text(
        json.dumps(
            {
                "kind": "train",
                "root": str(tmp_path / "root"),
                **train(gpus_per_worker=0).model_dump(mode="json", exclude_unset=True),
            }
        )
    )
    done = CliRunner().invoke(app, ["plan", str(file), "--target", on, "--json"])
    plan = json.loads(done.stdout[: done.stdout.rindex("}") + 1].split("\n{\n", 1)[0])
    assert sorted(Path(one["path"]).name for one in plan["inputs"]) == ["held-out.jsonl", "rows.jsonl"]
    assert JobStore(str(tmp_path / "root")).job_ids() == []
    assert not (tmp_path / "root" / "inputs").exists()


def test_rows_that_change_while_they_are_sent_leave_the_copy_of_another_job(here: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    (rows,) = with_inputs(train(data={"train": "rows.jsonl"}), store.uri).inputs
    send(store, rows)
    (here / "rows.jsonl").write_text(ROW * 9)
    with pytest.raises(ConfigError, match="changed while it was sent"):
        send(store, rows)
    assert store.read_text(*rows.key) == ROW, "a job that was submitted before reads it"
    store.delete(*rows.key)
    with pytest.raises(ConfigError, match="changed while it was sent"):
        send(store, rows)
    assert not store.exists(*rows.key)


def test_files_that_cannot_be_read_are_named(here: Path) -> None:
    (here / "docs" / "gone.md").symlink_to(here / "nowhere.md")
    context = {"train": "rows.jsonl", "context": {"corpus": "docs"}}
    with pytest.raises(StorageError, match=r"gone\.md"):
        with_inputs(train(data=context), "s3://bucket/a")
