"""`graftwork compare` from its spec to its page, on a real engine (tiny, random weights) in this process."""

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cli.compare import show_comparison
from graftwork.datasets.rows import fingerprint, read_rows
from graftwork.errors import ConfigError, DataError
from graftwork.prompts.render import Message
from graftwork.serving.evaluation.run import run_compare
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.messages import ArmRequest
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import Store
from tests import engines
from tests.adapters import facts
from tests.local_endpoint import LocalBackend, local_backend
from tests.tiny import write_tiny_base

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


class InProcess:
    """The replica on a loop of its own thread, asked from any loop, as an `Endpoint` is."""

    def __init__(self, spec: ServeSpec) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._backend: LocalBackend = self._now(local_backend(spec))
        self.asked = 0
        self.handle = SimpleNamespace(
            snapshot=SimpleNamespace(remote=lambda: self._away(self._backend.replica.snapshot()))
        )

    async def ask(self, arm: ArmSpec, messages: Sequence[Message], request_id: str) -> Any:
        self.asked += 1
        return (await self._away(self._backend.choices(ArmRequest(arm, tuple(messages), request_id))))[0]

    async def likelihood(self, arm: ArmSpec, messages: Any, continuations: list[str], request_id: str) -> Any:
        self.asked += 1
        return await self._away(self._backend.replica.likelihood(arm, tuple(messages), continuations, request_id))

    def close(self) -> None:
        self._backend.replica.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _away(self, call: Coroutine[Any, Any, Any]) -> "asyncio.Future[Any]":
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))

    def _now(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    base = write_tiny_base(folder / "base")
    resolved = base_model.resolve(BaseSpec(uri=str(base)))
    adapter = engines.write_lora(base, folder / "lora", seed=1)
    known = facts(base_digest=resolved.digest, prompt={})
    artifact.publish(Store(str(folder / "root")), "card", adapter, **known, alias="latest")
    rows = [
        {
            "id": f"q{i}",
            "messages": [{"role": "user", "content": f"Number {i}?"}],
            "doc_id": f"d{i}",
            "gold": {"a": i, "option": "yes"},
            "half": i % 2,
        }
        for i in range(8)
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = [{"id": f"d{i}", "text": f"number {i} is {i}"} for i in range(8)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    return folder


def spec(home: Path, **changes: Any) -> CompareSpec:
    tree = {
        "name": "tiny",
        "root": str(home / "root"),
        "base": {"uri": str(home / "base")},
        "limit": 6,
        "quant": {"kind": "none", "dtype": "float32"},
        "engine": {"max_seq_len": 256},
        "concurrency": 8,
        "eval": str(home / "eval.jsonl"),
        "answer_schema": str(home / "schema.json"),
        "baseline": "base",
        "scorers": ["fields", {"kind": "choice", "field": "option", "options": ["yes", "no"]}, "latency"],
        "slices": ["half"],
        "slice_min": 2,
        "cluster": "doc_id",
        "probes": {"distractors": 3},
        "judge": {"limit": 2},
        "arms": [
            {"name": "base", "max_new_tokens": 6},
            {"name": "rag", "max_new_tokens": 6, "retriever": {"corpus": str(home / "corpus.jsonl"), "k": 1}},
            {"name": "tuned", "max_new_tokens": 6, "adapter": "card@latest"},
        ],
    }
    return CompareSpec.model_validate({**tree, **changes})


@pytest.fixture(scope="module")
def endpoint(home: Path) -> Iterator[InProcess]:
    asked = spec(home)
    here = InProcess(ServeSpec(root=asked.root, base=asked.base, quant=asked.quant, engine=asked.engine))
    yield here
    here.close()


def test_a_comparison_asks_probes_judges_and_records(home: Path, endpoint: Any) -> None:
    found = run_compare(spec(home), endpoint=endpoint)
    report, card = found.report, found.report.card
    assert (report.n, report.clusters, [part.value for part in report.slices]) == (6, 6, ["0", "1"])
    assert card is not None
    assert (card.failures, card.probed) == (6, 6), "random weights write no card"
    causes = {cause.cause: cause.share.count for cause in card.causes}
    assert (causes["form"], causes["unknown"]) == (6, 0)
    assert {one.arm for one in card.arms} == {"base", "rag", "tuned"}
    tuned = next(cost for cost in card.costs if cost.arm == "tuned")
    assert tuned.adapter_gib is not None
    assert 0 < tuned.adapter_gib < 0.01
    assert report.judge is not None
    assert report.judge.failed == 0
    assert set(report.arms[0].scores) == {"facts", "form", "both", "field_accuracy", "choice"}
    timed = [(arm.latency_ms.n, arm.latency_ms.p50 > 0) for arm in report.arms if arm.latency_ms]
    assert timed == [(5, True)] * 3, "six questions, the first of which warms up"
    folder = Path(found.files.html_uri).parent
    assert {
        "answers.jsonl",
        "alone.jsonl",
        "scores.jsonl",
        "options.jsonl",
        "probes.jsonl",
        "judge.jsonl",
        "compare.json",
        "report.json",
    } <= {path.name for path in folder.iterdir()}
    assert Path(found.files.html_uri).stat().st_size < 1_000_000
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [(line["row_id"], line["arm"]) for line in lines] == [
        (f"q{i}", arm) for i in range(6) for arm in ("base", "rag", "tuned")
    ]
    for arm in report.arms:
        own = [line["scores"] for line in lines if line["arm"] == arm.name]
        assert {name: sum(one[name] for one in own) / 6 for name in own[0]} == pytest.approx(
            {name: score.value for name, score in arm.scores.items()}
        )
    once = (folder / "compare.json").read_bytes()
    before = endpoint.asked
    again = run_compare(spec(home), endpoint=endpoint)
    assert (again.asked, again.reused, endpoint.asked) == (0, 18, before), "nothing is asked twice"
    assert (folder / "compare.json").read_bytes() == once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": "document"}, "row 1: document: the field is missing"),
        ({"scorers": [{"kind": "choice", "field": "option", "options": ["no", "maybe"]}]}, "one of the options"),
        ({"scorers": [{"kind": "exact", "field": "city"}]}, "gold.city: found None"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_asked(
    home: Path, endpoint: Any, changes: dict[str, Any], message: str
) -> None:
    before = endpoint.asked
    with pytest.raises(DataError, match=message):
        run_compare(spec(home, **changes), endpoint=endpoint)
    choice = {"kind": "choice", "field": "option", "options": ["yes", "no"]}
    with pytest.raises(ConfigError, match="probes read written answers"):
        run_compare(spec(home, scorers=[choice]), endpoint=endpoint)
    assert endpoint.asked == before


def test_ignored_keys_and_questions_that_were_trained_on_are_noted_once(
    home: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in (home / "eval.jsonl").read_text().splitlines()]
    own = home / "own.jsonl"
    own.write_text("".join(json.dumps({**record, "lang": "en"}) + "\n" for record in records))
    known = facts(
        base_digest=base_model.resolve(BaseSpec(uri=str(home / "base"))).digest,
        prompt={},
        data_fingerprint=fingerprint(read_rows(str(own), need="eval")),
    )
    adapter = engines.write_lora(home / "base", home / "lora2", seed=2)
    made = artifact.publish(Store(str(home / "root")), "seen", adapter, **known, alias="latest")
    shots = home / "shots.jsonl"
    shots.write_text(json.dumps({"prompt": "q", "completion": "a", "topic": "x"}) + "\n")
    few: dict[str, Any] = {"name": "few", "max_new_tokens": 2, "prompt": {"shots": 1, "few_shot_file": str(shots)}}
    arms = [
        {"name": "base", "max_new_tokens": 2},
        few,
        {"name": "tuned", "max_new_tokens": 2, "adapter": "seen@latest"},
    ]
    plain: dict[str, Any] = {"name": "noted", "scorers": ["fields"], "slices": [], "cluster": None, "probes": None}
    found = run_compare(spec(home, **plain, judge=None, eval=str(own), limit=None, arms=arms), endpoint=endpoint)
    notes = (
        "eval: ignored keys: half (in 8 rows), lang (in 8 rows)",
        "prompt.few_shot_file: ignored keys: topic (in 1 row)",
        f"tuned: its adapter {made.ref} was trained on these very questions, so its scores say nothing about others.",
    )
    assert found.report.notes[:3] == notes
    page = Path(found.files.html_uri).read_text(encoding="utf-8")
    show_comparison(found.report, found.reused)
    said = " ".join(capsys.readouterr().out.split())
    for note in notes:
        assert said.count(note) == 1, "on the terminal"
        assert note in page, "and on the page"
