"""`graftwork quantize` on a private Ray and a tiny base: a process for each precision, a report, a free rerun."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.session import Session
from graftwork.errors import ArtifactError, ConfigError, DataError, StorageError
from graftwork.serving.quantize.run import QuantizeProgress, run_quantize
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.storage.store import Store
from tests.fake_arms import FIELDS, airports
from tests.tiny import write_tiny_base

SCHEMA = {"type": "object", "required": list(FIELDS)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, eval.jsonl and schema.json."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_base(folder / "base")
    rows = [{**asdict(row), "messages": [asdict(turn) for turn in row.messages]} for row in airports(4)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    return folder


def spec(inputs: Path, **changed: Any) -> QuantizeSpec:
    tree = {
        "name": "tiny",
        "root": str(inputs / "root"),
        "base": str(inputs / "base"),
        "precisions": ["fp32", "nf4"],
        "eval": str(inputs / "eval.jsonl"),
        "answer_schema": str(inputs / "schema.json"),
        "num_cpus": 1,
        "arms": [{"name": "base", "max_new_tokens": 4}],
        "text": {"window": 64, "stride": 32},
        "speed": {"batches": [1, 2], "prompt_tokens": 8, "new_tokens": 4, "rounds": 1},
        "engine": {"max_batch": 4, "max_seq_len": 256, "kv_tokens": 2048},
    }
    return QuantizeSpec.model_validate({**tree, **changed})


def test_each_precision_is_measured_once_and_judged(ray_cluster: Session, inputs: Path) -> None:
    seen: list[QuantizeProgress] = []
    first = ray_cluster.run(run_quantize, spec(inputs), on_progress=seen.append)
    assert [(p.done, p.total, p.text) for p in seen] == [(0, 2, "fp32"), (1, 2, "nf4")]
    report = first.report
    assert (report.n, first.reused) == (4, 0)
    assert report.recommended == "fp32", "four questions cannot rule out a loss"
    fp32, nf4 = report.precisions
    assert nf4.stored_bytes < fp32.stored_bytes
    assert all(arm.tokens_per_s[2].p50 > 0 and arm.perplexity > 1 for row in report.precisions for arm in row.arms)
    assert report.text.startswith(f"questions and gold answers of {inputs / 'eval.jsonl'}: ")
    assert [d.a for d in report.differences if d.metric == "both"] == ["nf4/base"]

    store = Store(str(inputs / "root"))
    assert store.list("runs", first.run_id) == [
        "precisions",
        "provenance.json",
        "report.html",
        "report.json",
        "spec.yaml",
        "status.json",
    ]
    assert store.read_json("runs", first.run_id, "report.json")["quantize"] == json.loads(report.model_dump_json())
    again = ray_cluster.run(run_quantize, spec(inputs))
    assert (again.run_id, again.reused, again.report) == (first.run_id, 2, report)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"num_cpus": 64}, ConfigError, "num_cpus=64"),
        ({"eval": "nowhere.jsonl"}, StorageError, "nowhere.jsonl"),
        ({"text": {"window": 4096}}, ConfigError, "text.window=4096"),
        ({"arms": [{"name": "tuned", "adapter": "missing@latest"}]}, ArtifactError, "missing"),
    ],
)
def test_mistakes_are_found_before_a_process_is_started(
    ray_cluster: Session, inputs: Path, changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ray_cluster.run(run_quantize, spec(inputs, **changed))


def test_an_error_in_the_measuring_process_is_told_as_it_is(ray_cluster: Session, inputs: Path) -> None:
    long = spec(inputs, arms=[{"name": "base", "max_new_tokens": 255}])
    with pytest.raises(DataError, match="engine.max_seq_len=256"):
        ray_cluster.run(run_quantize, long)
