"""A live split and a shadow over real HTTP, asked by the official openai client; and what is refused."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.serving.ab_test.log import LogRow
from graftwork.serving.ab_test.log_reader import ExperimentLog
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base
from tests.waiting import until

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
SPLIT: dict[str, Any] = {
    "kind": "experiment",
    "name": "cards",
    "control": "plain",
    "primary": "thumbs",
    "log_every_s": 0.2,
    "arms": [{"name": "plain", "weight": 0.5}, {"name": "tuned", "model": "base:card", "weight": 0.5}],
}
SHADOW = {
    **SPLIT,
    "name": "unseen",
    "mode": "shadow",
    "arms": [{"name": "plain"}, {"name": "tuned", "model": "base:card"}],
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ServeSpec:
    tmp = tmp_path_factory.mktemp("live")
    base = write_tiny_base(tmp / "base")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    for seed, alias in enumerate(("latest", "next")):
        folder = write_lora(base, tmp / alias, seed, r=4, target_modules=["q_proj"])
        artifact.publish(store, "card", folder, **facts(base_digest=digest, prompt={"system": None}), alias=alias)
    return ServeSpec.model_validate(
        {
            "base": str(base),
            "root": store.uri,
            "quant": {"kind": "none"},
            "arms": [{"name": "plain"}, {"name": "coded", "grammar": {"regex": "[A-Z]{2}"}}],
            "engine": {"max_seq_len": 128, "num_threads": 1},
        }
    )


@pytest.fixture(scope="module")
def url(spec: ServeSpec) -> Iterator[str]:
    with local_endpoint(spec) as running:
        yield running


def admin(url: str, verb: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/admin/experiments/{verb}", json=body, timeout=60)


def start(url: str, spec: dict[str, Any], **changed: Any) -> dict[str, Any]:
    response = admin(url, "start", spec={**spec, **changed})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["data"][0]
    return found


def status(url: str, name: str) -> dict[str, Any]:
    listed = httpx.get(f"{url}/v1/admin/experiments", timeout=60).json()["data"]
    return {one["name"]: one for one in listed}[name]  # type: ignore[no-any-return]


def ask(url: str, model: str, user: str | None = None, **changed: Any) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 2, **({"user": user} if user else {}), **changed}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def rows_of(url: str, name: str, count: int) -> list[LogRow]:
    """All rows but assignments, once there are that many; every answer has its assignment before it."""
    found: list[LogRow] = []

    def written() -> bool:
        log = ExperimentLog(Store(status(url, name)["log"]["uri"]), ())
        found[:] = log.rows()
        assert (log.health.damaged, log.health.duplicates) == ([], 0)
        return sum(row.kind != "assignment" for row in found) >= count and not status(url, name)["log"]["waiting"]

    until(written, within_s=30)
    drawn: dict[tuple[str, str], tuple[str, str, float | None]] = {}
    for row in found:
        if row.kind == "assignment":
            drawn[row.request_id, row.arm] = row.unit, row.role, row.probability
        elif row.kind == "answer":
            assert drawn[row.request_id, row.arm] == (row.unit, row.role, row.probability)
    return [row for row in found if row.kind != "assignment"]


def test_the_openai_client_gets_a_sticky_arm_and_every_answer_is_written_once(url: str, spec: ServeSpec) -> None:
    began = start(url, SPLIT)
    version = aliases(Store(spec.root), "card")["latest"]
    assert [arm["adapter"] for arm in began["arms"]] == [None, f"card@{version}"], "the alias is pinned at the start"
    arms: dict[str, set[str]] = {}
    ids: dict[str, str] = {}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert "experiment/cards" in {model.id for model in client.models.list()}
        asking = client.chat.completions.with_raw_response
        for number in range(24):
            user = f"user{number % 8}"
            raw = asking.create(model="experiment/cards", messages=HELLO, max_tokens=2, user=user)
            assert raw.headers["x-graftwork-experiment"] == began["id"]
            arms.setdefault(user, set()).add(raw.headers["x-graftwork-arm"])
            assert (raw.headers.get("x-graftwork-adapter-version") == version) == ("tuned" in arms[user])
            ids[raw.parse().id] = raw.headers["x-graftwork-arm"]
        stream = client.chat.completions.create(
            model="experiment/cards", messages=HELLO, max_tokens=2, stream=True, extra_headers={"x-session-id": "s1"}
        )
        ids[[chunk.id for chunk in stream][0]] = "?"
    assert all(len(found) == 1 for found in arms.values())
    assert {arm for found in arms.values() for arm in found} == {"plain", "tuned"}
    answers = [row for row in rows_of(url, "cards", 26) if row.kind == "answer"]
    assert Counter(row.request_id for row in answers) == Counter(list(ids))
    assert all(row.arm == ids[row.request_id] for row in answers if ids[row.request_id] != "?")
    assert {row.probability for row in answers} == {0.5}
    assert len({row.unit for row in answers}) == 9
    assert not any("user" in row.unit for row in answers)
    assert all(row.output is not None and row.completion_tokens and row.latency_ms for row in answers)
    assert {row.adapter_version for row in answers if row.arm == "tuned"} == {version}


def test_a_later_score_counts_once_and_needs_its_answer(url: str) -> None:
    request_id = ask(url, "experiment/cards", "scored").json()["id"]

    def give(**scores: float) -> httpx.Response:
        return httpx.post(f"{url}/v1/feedback", json={"request_id": request_id, "scores": scores}, timeout=60)

    assert give(thumbs=1).json() == {"request_id": request_id, "counted": ["thumbs"], "already_counted": []}
    assert give(thumbs=1).json()["already_counted"] == ["thumbs"]
    assert give(thumbs=0).json()["error"]["code"] == "already_scored"
    assert give(stars=2).json()["counted"] == ["stars"]
    unknown = httpx.post(f"{url}/v1/feedback", json={"request_id": "chatcmpl-0", "scores": {"thumbs": 1}}, timeout=60)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_request")
    other = ask(url, "experiment/cards", "scored").json()["id"]
    beyond = httpx.post(f"{url}/v1/feedback", json={"request_id": other, "scores": {"thumbs": 2}}, timeout=60)
    assert "not within [0, 1]" in beyond.json()["error"]["message"]
    rows = rows_of(url, "cards", 30)
    (answer,) = [row for row in rows if row.kind == "answer" and row.request_id == request_id]
    scores = [row for row in rows if row.kind == "score" and row.request_id == request_id]
    assert [(row.detail, row.scores) for row in scores] == [("thumbs", {"thumbs": 1.0}), ("stars", {"stars": 2.0})]
    assert {(row.unit, row.arm, row.probability) for row in scores} == {(answer.unit, answer.arm, 0.5)}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"control": "tuned"}, "control"),
        ({"arms": [{"name": "plain", "weight": 0.5}, {"name": "tuned", "model": "base", "weight": 0.5}]}, "arms"),
        ({"arms": [{"name": "plain", "weight": 0.6}, {"name": "tuned", "model": "base:card", "weight": 0.4}]}, "ramp"),
        ({"primary": "stars"}, "primary"),
        ({"unit": "session"}, "unit"),
    ],
)
def test_an_experiment_that_runs_is_not_changed(url: str, changed: dict[str, Any], named: str) -> None:
    response = admin(url, "start", spec={**SPLIT, **changed})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "experiment_changed")
    assert named in response.json()["error"]["message"]
    assert start(url, SPLIT)["id"] == status(url, "cards")["id"], "the same again finds it running"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"arms": [{"name": "plain", "weight": 0.5}, {"name": "x", "model": "base", "weight": 0.4}]}, "sum to 1"),
        ({"arms": [{"name": "plain", "weight": 0.5}, {"name": "x", "model": "base"}]}, "a weight for each"),
        ({"arms": [{"name": "plain", "weight": 1.0}]}, "at least 2"),
        ({"arms": [{"name": "plain", "weight": 0.5}, {"name": "plain", "weight": 0.5}]}, "names must differ"),
        ({"arms": [{"name": "plain", "weight": 0.5}, {"name": "nosuch", "weight": 0.5}]}, "arm/nosuch"),
        ({"arms": [{"name": "plain", "weight": 0.5}, {"name": "x", "model": "base:no", "weight": 0.5}]}, "no@latest"),
        ({"control": "nobody"}, "none of the arms"),
        ({"overrides": {"me": "nobody"}}, "none of the arms"),
        ({"mode": "shadow"}, "can't act"),
        ({"scorers": ["exact"]}, "no gold"),
        ({"primary": {"name": "stars", "kind": "unbounded"}}, "stars comes by feedback"),
        ({"primary": {"name": "thumbs", "deadline_s": 0}}, "greater than 0"),
        ({"guardrails": [{"kind": "schema_invalid", "limit": 0.1}]}, "none of the scorers"),
        ({"salted": 1}, "unknown key"),
        ({"log": "ftp://x/y"}, "names no place"),
    ],
)
def test_what_cannot_run_is_refused_before_it_begins(url: str, changed: dict[str, Any], said: str) -> None:
    response = admin(url, "start", spec={**SPLIT, "name": "bad", **changed})
    assert response.status_code in (400, 404), response.text
    assert said in response.json()["error"]["message"]
    assert ask(url, "experiment/bad").json()["error"]["code"] == "model_not_found"


def test_overrides_holdout_units_and_the_switch(url: str) -> None:
    changed = {"name": "placed", "overrides": {"boss": "tuned"}, "holdout": 0.5, "unit": ["user", "session"]}
    start(url, SPLIT, **changed)
    assert ask(url, "experiment/placed").json()["error"]["code"] == "missing_unit"
    for number in range(12):
        assert ask(url, "experiment/placed", f"u{number}").status_code == 200
    assert ask(url, "experiment/placed", "boss").headers["x-graftwork-arm"] == "tuned"
    assert admin(url, "kill", name="placed").json()["data"][0]["status"] == "killed"
    assert ask(url, "experiment/placed", "boss").headers["x-graftwork-arm"] == "plain"
    assert admin(url, "resume", name="placed").json()["data"][0]["status"] == "running"
    assert ask(url, "experiment/placed", "boss").headers["x-graftwork-arm"] == "tuned"
    rows = rows_of(url, "placed", 17)
    roles = Counter((row.role, row.probability) for row in rows if row.kind == "answer")
    assert roles["override", None] == 2, "what was answered while the switch was on is not in the log"
    assert {role for role, _ in roles} == {"primary", "holdout", "override"}
    assert {row.arm for row in rows if row.role == "holdout"} == {"plain"}
    assert [row.event for row in rows if row.kind == "event"] == ["start", "kill", "resume"]


def test_a_shadow_answers_a_copy_that_nobody_sees(url: str) -> None:
    start(url, SHADOW)
    seen = [ask(url, "experiment/unseen", f"u{number}") for number in range(6)]
    assert {response.headers["x-graftwork-arm"] for response in seen} == {"plain"}
    until(lambda: sum(arm["answers"] for arm in status(url, "unseen")["arms"]) == 12, within_s=30)
    rows = [row for row in rows_of(url, "unseen", 13) if row.kind == "answer"]
    pairs = {row.request_id: {one.role: one for one in rows if one.request_id == row.request_id} for row in rows}
    assert pairs.keys() == {response.json()["id"] for response in seen}
    for pair in pairs.values():
        assert (pair["primary"].arm, pair["shadow"].arm) == ("plain", "tuned")
        assert pair["primary"].prompt_hash == pair["shadow"].prompt_hash
        assert pair["shadow"].probability is None
    assert admin(url, "ramp", name="unseen", weights={"plain": 0.5, "tuned": 0.5}).status_code == 400


def test_weights_change_by_ramp_alone_and_an_ended_experiment_stays_ended(url: str) -> None:
    start(url, SPLIT, name="ramped")
    before = {n: ask(url, "experiment/ramped", f"u{n}").headers["x-graftwork-arm"] for n in range(16)}
    assert admin(url, "ramp", name="ramped", weights={"plain": 0.5, "tuned": 0.4}).status_code == 400
    assert admin(url, "ramp", name="ramped", weights={"plain": 0.0, "tuned": 1.0}).status_code == 200
    after = {n: ask(url, "experiment/ramped", f"u{n}").headers["x-graftwork-arm"] for n in range(16)}
    assert set(after.values()) == {"tuned"}
    assert set(before.values()) == {"plain", "tuned"}
    assert admin(url, "stop", name="ramped").json()["data"][0]["status"] == "stopped"
    stopped = ask(url, "experiment/ramped", "u1")
    assert stopped.headers["x-graftwork-arm"] == "plain", "its control answers, so that no caller fails"
    assert admin(url, "start", spec={**SPLIT, "name": "ramped"}).json()["error"]["code"] == "experiment_ended"
    rows = rows_of(url, "ramped", 35)
    told = [json.loads(row.detail or "")["weights"] for row in rows if row.event in ("start", "ramp")]
    assert told == [{"plain": 0.5, "tuned": 0.5}, {"plain": 0.0, "tuned": 1.0}]
    assert [row.probability for row in rows if row.kind == "answer"] == [0.5] * 16 + [1.0] * 16


def test_a_restart_goes_on_with_the_same_arms_and_scores_what_came_before(spec: ServeSpec, tmp_path: Path) -> None:
    moved = spec.model_copy(update={"root": str(tmp_path / "root")})
    tree = {**SPLIT, "arms": [{"name": "plain", "weight": 0.5}, {"name": "other", "model": "base", "weight": 0.5}]}
    with local_endpoint(moved) as url:
        start(url, tree)
        admin(url, "ramp", name="cards", weights={"plain": 0.3, "other": 0.7})
        first = {n: ask(url, "experiment/cards", f"u{n}") for n in range(8)}
    with local_endpoint(moved) as url:
        assert [arm["weight"] for arm in status(url, "cards")["arms"]] == [0.3, 0.7]
        second = {n: ask(url, "experiment/cards", f"u{n}") for n in range(8)}
        assert [r.headers["x-graftwork-arm"] for r in first.values()] == [
            r.headers["x-graftwork-arm"] for r in second.values()
        ]
        late = {"request_id": first[0].json()["id"], "scores": {"thumbs": 0}}
        until(lambda: httpx.post(f"{url}/v1/feedback", json=late, timeout=60).status_code == 200, within_s=30)
        rows = rows_of(url, "cards", 10)
        assert Counter(row.kind for row in rows) == {"answer": 16, "event": 3, "score": 1}


def test_a_damaged_record_takes_no_other_along(spec: ServeSpec, tmp_path: Path) -> None:
    moved = spec.model_copy(update={"root": str(tmp_path / "root")})
    tree = {**SPLIT, "arms": [{"name": "plain", "weight": 0.5}, {"name": "other", "model": "base", "weight": 0.5}]}
    with local_endpoint(moved) as url:
        lost, kept = start(url, tree, name="lost"), start(url, tree, name="kept")
    state = tmp_path / "root" / "experiments" / lost["id"] / "state.json"
    state.write_bytes(state.read_bytes()[:100])
    with local_endpoint(moved) as url:
        assert [one["id"] for one in httpx.get(f"{url}/v1/admin/experiments", timeout=60).json()["data"]] == [
            kept["id"]
        ]
        assert ask(url, "experiment/kept", "u").status_code == 200


def test_with_a_full_buffer_requests_take_no_part_and_feedback_is_refused_until_there_is_room(
    url: str, tmp_path: Path
) -> None:
    blocked = tmp_path / "log"
    blocked.write_text("")  # a file where the log's folder would be
    start(url, SPLIT, name="blocked", log=str(blocked), log_buffer=3)
    first, second = ask(url, "experiment/blocked", "u1"), ask(url, "experiment/blocked", "u2")
    assert (first.status_code, second.status_code) == (200, 200)
    assert status(url, "blocked")["log"]["dropped"] == 1
    late = {"request_id": first.json()["id"], "scores": {"thumbs": 1}}
    refused = httpx.post(f"{url}/v1/feedback", json=late, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "log_full")
    blocked.unlink()
    until(lambda: httpx.post(f"{url}/v1/feedback", json=late, timeout=60).status_code == 200, within_s=30)
    rows = rows_of(url, "blocked", 3)
    assert [(row.kind, row.request_id) for row in rows if row.kind != "event"] == [
        ("answer", first.json()["id"]),
        ("score", first.json()["id"]),
    ]


def test_an_answer_that_fails_is_written_as_a_failure(url: str) -> None:
    start(url, SPLIT, name="failing")
    long = [{"role": "user", "content": "which airport " * 200}]
    assert ask(url, "experiment/failing", "u", messages=long).status_code == 400
    (row,) = [row for row in rows_of(url, "failing", 2) if row.kind == "answer"]
    assert (row.error, row.output, row.scores) == ("context_length_exceeded", None, {})


def test_an_arm_whose_guardrail_breaks_is_cut_by_itself_and_stays_out(url: str) -> None:
    """The arm `coded` has its own grammar and so refuses every request that brings one."""
    arms = [{"name": "plain", "weight": 0.5}, {"name": "coded", "weight": 0.5}]
    began = start(url, SPLIT, name="guarded", arms=arms, guardrails=[{"kind": "errors", "limit": 0.05}])
    assert {arm["name"]: arm["weight"] for arm in began["arms"]} == {"plain": 0.5, "coded": 0.5}
    asked = 0
    while (found := status(url, "guarded"))["arms"][1]["cut"] is None:
        assert asked < 200, found["judged"]["guardrails"]
        for number in range(10):
            response = ask(url, "experiment/guarded", f"u{asked + number}", regex="[a-z]{2}")
            assert response.status_code in (200, 400)
        asked += 10
        until(lambda: status(url, "guarded")["log"]["waiting"] == 0, within_s=30)
    assert {arm["name"]: arm["weight"] for arm in found["arms"]} == {"plain": 1.0, "coded": 0.0}
    assert {ask(url, "experiment/guarded", f"v{n}").headers["x-graftwork-arm"] for n in range(8)} == {"plain"}
    back = admin(url, "ramp", name="guarded", weights={"plain": 0.5, "coded": 0.5})
    assert (back.status_code, back.json()["error"]["code"]) == (409, "arm_was_cut")
    events = [row for row in rows_of(url, "guarded", asked + 8 + 3) if row.kind == "event"]
    assert [row.event for row in events] == ["start", "cut", "ramp"]
    (why,) = json.loads(events[1].detail or "")["guardrails"]
    assert (why["kind"], why["limit"]) == ("errors", 0.05)
    assert why["e_value"] >= 100, "1 / alpha"


def test_scores_of_the_spec_come_with_the_answer(url: str) -> None:
    scorers = [{"kind": "regex", "name": "short", "pattern": "(?s).{0,400}"}]
    start(url, SPLIT, name="scored", scorers=scorers, primary="short", log_outputs=False)
    for number in range(8):
        ask(url, "experiment/scored", f"u{number}")
    rows = [row for row in rows_of(url, "scored", 9) if row.kind == "answer"]
    assert [row.scores for row in rows] == [{"short": 1.0}] * 8
    assert {row.output for row in rows} == {None}, "log_outputs is false"
    late = {"request_id": rows[0].request_id, "scores": {"short": 0.0}}
    assert httpx.post(f"{url}/v1/feedback", json=late, timeout=60).json()["error"]["code"] == "already_scored"
    judged = status(url, "scored")["judged"]
    assert sum(arm["scored"] for arm in judged["arms"]) == 8
    assert {arm["mean"] for arm in judged["arms"]} == {1.0}
