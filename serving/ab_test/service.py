"""Experiments of one endpoint in its ingress: start, change, end, and resume after a restart."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prometheus_client.core import Metric

from graftwork import config
from graftwork.config import canonical_json
from graftwork.errors import ConfigError, GraftworkError
from graftwork.serving.ab_test.experiment_record import ExperimentRecord, Records, new_record
from graftwork.serving.ab_test.live_experiment import (
    FeedbackRequest,
    LiveExperiment,
    LiveRequest,
    RecentAnswers,
    finite,
)
from graftwork.serving.ab_test.log import rules_of, scorers_of
from graftwork.serving.ab_test.spec import ExperimentSpec, identity_of, require_weights, weights_detail
from graftwork.serving.api.errors import ApiError, as_api_errors, bad_request, unknown_model
from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.arms import Catalog
from graftwork.serving.metrics_export import counter, gauge
from graftwork.serving.router import EngineBackend
from graftwork.serving.spec import ArmSpec
from graftwork.storage.store import Store

log = logging.getLogger("ray.serve")
PREFIX = "experiment/"
SESSION_HEADER = "x-session-id"


class Experiments:
    """All methods run on the ingress' event loop. `open` once; until then there are none."""

    def __init__(self, root: str, catalog: Catalog, backend: EngineBackend) -> None:
        self._records, self._catalog, self._backend = Records(Store(root)), catalog, backend
        self._recent = RecentAnswers()
        self._by_name: dict[str, LiveExperiment] = {}
        """The latest of each name."""
        self._lives: dict[str, LiveExperiment] = {}
        """All of them by id: feedback still comes to those that were stopped."""
        self._tasks: list[asyncio.Task[None]] = []
        self._opening = asyncio.Lock()
        self._opened = False

    async def open(self) -> None:
        """Go on with what the store has. Calls after the first do nothing.

        The `resume` row with weights ends the requests that were in flight in the process before (see `units`).
        """
        async with self._opening:
            if self._opened:
                return
            with as_api_errors():
                found = await asyncio.to_thread(self._records.load_all)
            for record in found:  # oldest first: the latest of a name is the one that answers
                self._take_up(record)
                if record.status in ("running", "killed"):
                    self._by_name[record.spec.name].tell("resume", weights_detail(record.weights))
            self._opened = True

    async def close(self) -> None:
        """Publish what is waiting and stop. The records stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for live in self._lives.values():
            await live.close()

    async def request(self, model: str, user: str | None, session: str | None, request_id: str) -> LiveRequest:
        """Assign one request. Raises ApiError: no such experiment, or the request names no unit that it wants."""
        live = await self._find_named(model.removeprefix(PREFIX), model)
        named = {"user": user, "session": session, "request": request_id}
        kind = next((kind for kind in live.record.spec.unit if named[kind]), None)
        if kind is None:
            wanted = " or ".join({"user": "`user`", "session": SESSION_HEADER}[k] for k in live.record.spec.unit)
            raise bad_request(
                f"This experiment assigns by {wanted}: the request has none.", param="user", code="missing_unit"
            )
        placed = live.place(kind, str(named[kind]))
        return LiveRequest(live, placed, self._backend)

    async def start(self, tree: Mapping[str, Any]) -> LiveExperiment:
        """Start one, or find that it runs already. Raises ApiError: arms that can't be asked, another of its name."""
        spec = _spec_of(tree)
        await self.open()
        old = self._by_name.get(spec.name)
        if old is not None and old.record.status in ("running", "killed"):
            _require_same(old.record, spec)
            return old
        _require_measurable(spec)
        arms = {arm.name: await self._pin_arm(arm.name, arm.model_name) for arm in spec.arms}
        base_digest = (await self._backend.call("snapshot")).base_digest
        record = new_record(spec, arms, base_digest)
        if record.id in self._lives:
            raise ApiError(
                409,
                f"The experiment {record.id} has ended, and what ended is not begun again: looking "
                "twice is choosing. Give it another name or salt.",
                code="experiment_ended",
            )
        with as_api_errors():
            await asyncio.to_thread(self._records.save, record)
        live = self._take_up(record)
        live.tell("start", {**weights_detail(record.weights), "spec": spec.model_dump(mode="json")})
        return live

    async def check(self, specs: Sequence[ExperimentSpec], catalog: Catalog) -> None:
        """Return whether `declare` could take them, with the arms that the catalog will have. Raises ApiError."""
        await self.open()
        for spec in specs:
            _require_measurable(spec)
            for arm in spec.arms:
                catalog.arm(arm.model_name)
            old = self._by_name.get(spec.name)
            if old is not None and old.record.status in ("running", "killed"):
                _require_identity(old.record, spec)

    async def declare(self, spec: ExperimentSpec, was: ExperimentSpec | None) -> None:
        """Have it run, with its weights where they differ from what was declared before; else a ramp by hand stays.

        One that was stopped stays so. Raises ApiError.
        """
        await self.open()
        old = self._by_name.get(spec.name)
        if old is None or (old.record.status not in ("running", "killed") and _changed_keys(old.record, spec)):
            await self.start(spec.model_dump(mode="json"))
        elif old.record.status in ("running", "killed") and spec.weights != (was or old.record.spec).weights:
            await self.ramp(spec.name, spec.weights)

    async def ramp(self, name: str, weights: dict[str, float]) -> LiveExperiment:
        """New weights from now on."""
        live = await self._running_experiment(name)
        if live.record.spec.mode == "shadow":
            raise bad_request(
                "A shadow has no weights: its control answers all.", param="weights", code="invalid_value"
            )
        try:
            require_weights("weights", weights, list(live.record.arms))
        except ValueError as error:
            raise bad_request(str(error), param="weights", code="invalid_value") from None
        back = sorted(arm for arm in live.record.cut_arms if weights[arm])
        if back:
            raise ApiError(
                409,
                f"{back[0]!r} was cut and stays out: its weight is 0. Start a new experiment to try it again.",
                code="arm_was_cut",
            )
        with as_api_errors():
            await live.ramp(weights)
        return live

    async def stop(self, name: str) -> LiveExperiment:
        """End it for good: its control answers everybody."""
        live = await self._find_named(name, name)
        if live.record.status != "stopped":
            with as_api_errors():
                await live.change("stop", {}, status="stopped")
            await live.shadow.close()
            await live.step(last=True)
        return live

    async def kill(self, name: str, *, on: bool) -> LiveExperiment:
        """The switch: while it is on, the control answers everybody and nothing is drawn or written down."""
        live = await self._find_named(name, name)
        wanted, event = ("killed", "kill") if on else ("running", "resume")
        if live.record.status not in ("running", "killed"):
            raise ApiError(409, f"The experiment {live.record.id} is {live.record.status}.", code="experiment_ended")
        if live.record.status != wanted:
            with as_api_errors():
                await live.change(event, {}, status=wanted)
        return live

    async def feedback(self, body: FeedbackRequest) -> Json:
        """Scores that come later. Raises ApiError: unknown answer, another value than before, out of range."""
        await self.open()
        answered = self._recent.find(body.request_id)
        if answered is None:
            raise ApiError(
                404,
                f"No answer of an experiment has the id {body.request_id!r}: unknown, not ended yet, "
                "or older than those remembered.",
                code="unknown_request",
                param="request_id",
            )
        if answered.live.recorder.full:
            raise ApiError(
                503,
                "The experiment's log can't be written now and its buffer is full. Send the score again later.",
                code="log_full",
            )
        spec = answered.live.record.spec
        new = {metric: value for metric, value in body.scores.items() if metric not in answered.scores}
        for metric, value in body.scores.items():
            if metric in answered.live.scored_here:
                raise ApiError(
                    409, f"{metric} is what this experiment scores itself.", code="already_scored", param="scores"
                )
            if answered.scores.get(metric, value) != value:
                raise ApiError(
                    409,
                    f"{metric} was given as {answered.scores[metric]:g} before, and counts once.",
                    code="already_scored",
                    param="scores",
                )
            if metric == spec.primary.name and not spec.primary.low <= value <= spec.primary.high:
                raise bad_request(
                    f"{metric}={value:g} is not within [{spec.primary.low:g}, {spec.primary.high:g}].",
                    param="scores",
                    code="invalid_value",
                )
        for metric, value in new.items():
            answered.scores[metric] = value
            answered.live.recorder.add(answered.score_row(metric, value, time.time()))
        known = sorted(set(body.scores) - set(new))
        return {"request_id": body.request_id, "counted": sorted(new), "already_counted": known}

    async def all(self) -> list[LiveExperiment]:
        """The latest of each name."""
        await self.open()
        return [self._by_name[name] for name in sorted(self._by_name)]

    def now(self) -> list[LiveExperiment]:
        """As `all`, of those that were opened."""
        return list(self._by_name.values())

    async def get(self, name: str) -> LiveExperiment:
        """One of them. Raises ApiError 404."""
        return await self._find_named(name, name)

    def _take_up(self, record: ExperimentRecord) -> LiveExperiment:
        live = LiveExperiment(record, self._records, self._backend, self._recent)
        self._by_name[record.spec.name] = self._lives[record.id] = live
        self._tasks.append(asyncio.create_task(live.run()))
        return live

    async def _pin_arm(self, name: str, model: str) -> ArmSpec:
        """The model as this arm is asked: its adapter loaded, and pinned to the version that the alias means now."""
        arm = self._catalog.arm(model).with_({"name": name})
        if arm.adapter is None:
            return arm
        loaded = await self._backend.call("registry", "load", arm.adapter)
        return arm.with_({"adapter": f"{arm.adapter.partition('@')[0]}@{loaded['version']}"})

    async def _running_experiment(self, name: str) -> LiveExperiment:
        live = await self._find_named(name, name)
        if live.record.status != "running":
            raise ApiError(409, f"The experiment {live.record.id} is {live.record.status}.", code="experiment_ended")
        return live

    async def _find_named(self, name: str, asked: str) -> LiveExperiment:
        await self.open()
        if name not in self._by_name:
            names = ", ".join(sorted(self._by_name)) or "none"
            raise unknown_model(asked, f"Experiments here: {names}.")
        return self._by_name[name]


def _spec_of(tree: Mapping[str, Any]) -> ExperimentSpec:
    try:
        return config.validate(ExperimentSpec, tree, where="experiment")
    except ConfigError as error:
        said = f"{error.subject}: {error.problem}" + (f". {error.rule}" if error.rule else "")
        raise bad_request(said, param="spec", code="invalid_experiment") from None


def _require_measurable(spec: ExperimentSpec) -> None:
    """Raises ApiError where its scorers or rules can't work."""
    try:
        known = {metric.name for metric in scorers_of(spec).metrics}
        rules_of(spec)
    except GraftworkError as error:
        said = f"{error.subject}: {error.problem}" + (f". {error.rule}" if error.rule else "")
        raise bad_request(said, param="spec", code="invalid_experiment") from None
    for guardrail in spec.guardrails:
        if guardrail.kind == "schema_invalid" and guardrail.score not in known:
            raise bad_request(
                f"guardrails: schema_invalid looks at the score {guardrail.score!r}, which none of the "
                f"scorers gives ({', '.join(sorted(known)) or 'there are none'}).",
                param="spec",
                code="invalid_experiment",
            )


def _changed_keys(running: ExperimentRecord, spec: ExperimentSpec) -> list[str]:
    """Keys of its identity that differ."""
    was, now = identity_of(running.spec), identity_of(spec)
    return sorted(key for key in was if canonical_json(was[key]) != canonical_json(now[key]))


def _require_identity(running: ExperimentRecord, spec: ExperimentSpec) -> None:
    """Raises ApiError 409 where the spec is another experiment than what runs under its name."""
    changed = _changed_keys(running, spec)
    if changed:
        raise ApiError(
            409,
            f"{running.id} runs, and this spec changes {', '.join(changed)}: what was seen so far "
            "belongs to the old one. Stop it, or start the changed one under a new name.",
            code="experiment_changed",
            param=changed[0],
        )


def _require_same(running: ExperimentRecord, spec: ExperimentSpec) -> None:
    """As `_require_identity`, and with the weights that it runs with."""
    _require_identity(running, spec)
    if running.weights != spec.weights and not running.cuts and running.spec.weights != spec.weights:
        raise ApiError(
            409,
            f"{running.id} runs with other weights {running.weights}: weights change by `ramp` alone.",
            code="experiment_changed",
            param="arms",
        )


# Status document of an experiment, for the admin route, the command line and GET /metrics.


def status(live: LiveExperiment) -> Json:
    """Plain data; counts are since the ingress began, what the monitor tells is of the whole experiment."""
    record, recorder = live.record, live.recorder
    cuts = {cut.arm: cut for cut in record.cuts}
    arms = [
        {
            "name": name,
            "adapter": arm.adapter,
            "weight": record.weights[name] if name not in cuts else 0.0,
            "answers": sum(count for key, count in live.counts.items() if key[0] == name),
            "errors": sum(count for key, count in live.counts.items() if key[0] == name and key[2] != "ok"),
            "cut": cuts[name].why if name in cuts else None,
        }
        for name, arm in record.arms.items()
    ]
    return {
        "id": record.id,
        "name": record.spec.name,
        "model": f"experiment/{record.spec.name}",
        "mode": record.spec.mode,
        "status": record.status,
        "control": record.spec.control,
        "started_at": record.started_at,
        "primary": record.spec.primary.name,
        "base_digest": record.base_digest,
        "arms": arms,
        "log": {
            "uri": live.log_uri,
            "written": recorder.written,
            "waiting": recorder.waiting,
            "dropped": recorder.dropped,
            "problem": recorder.problem,
            "damaged": live.damaged,
        },
        "judged": _judged_json(live),
        "shadow": {"waiting": live.shadow.waiting, "dropped": live.shadow.dropped},
    }


def _judged_json(live: LiveExperiment) -> Json:
    """The monitor's state as JSON can hold it."""
    tree = asdict(live.judged)
    tree["contrasts"] = [one.model_dump() for one in live.judged.contrasts]
    tree["srm_e_value"] = finite(tree["srm_e_value"])
    for key in ("contrasts", "guardrails"):
        for one in tree[key]:
            one |= {name: finite(value) for name, value in one.items() if isinstance(value, float)}
    return tree


def experiment_families(lives: Sequence[LiveExperiment]) -> list[Metric]:
    """Return Prometheus families: answers by experiment, arm, role and outcome; what was dropped."""
    answers: Counter[tuple[str, ...]] = Counter()
    for live in lives:
        answers.update({(live.record.id, *key): count for key, count in live.counts.items()})
    dropped = {(one.record.id, "log"): one.recorder.dropped for one in lives}
    dropped |= {(one.record.id, "shadow"): one.shadow.dropped for one in lives}
    return [
        counter(
            "experiment_answers",
            "Answers of an experiment's arms; outcome ok, or the error's code.",
            dict(sorted(answers.items())),
            ("experiment", "arm", "role", "outcome"),
        ),
        gauge(
            "experiment_split_evidence",
            "E-value against the split that was asked for: over 1 / srm_alpha no verdict may be drawn.",
            {(one.record.id,): one.judged.srm_e_value for one in lives},
            ("experiment",),
        ),
        counter(
            "experiment_dropped",
            "Requests for which the log's buffer had no room, and copies for which the shadow's queue had none.",
            dropped,
            ("experiment", "what"),
        ),
    ]
