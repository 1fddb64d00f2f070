"""What an experiment is doing now, as one document: for the admin route, the command line and GET /metrics."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from graftwork.serving.arms import Dump
from graftwork.serving.experiment.online.live import LiveExperiment, finite
from graftwork.serving.metrics_families import Family


def status(live: LiveExperiment) -> Dump:
    """Plain data; counts are since the ingress began, what the monitor tells is of the whole experiment."""
    record, recorder = live.record, live.recorder
    cuts = {cut.arm: cut for cut in record.cuts}
    arms = [
        {
            "name": name, "adapter": arm.adapter, "weight": record.weights[name] if name not in cuts else 0.0,
            "answers": sum(count for key, count in live.counts.items() if key[0] == name),
            "errors": sum(count for key, count in live.counts.items() if key[0] == name and key[2] != "ok"),
            "cut": cuts[name].why if name in cuts else None,
        }
        for name, arm in record.arms.items()
    ]  # fmt: skip
    return {
        "id": record.id, "name": record.spec.name, "model": f"experiment/{record.spec.name}", "mode": record.spec.mode,
        "status": record.status, "control": record.spec.control, "started_at": record.started_at,
        "primary": record.spec.primary.name, "base_digest": record.base_digest, "arms": arms,
        "log": {"uri": live.log_uri, "written": recorder.written, "waiting": recorder.waiting,
                "dropped": recorder.dropped, "problem": recorder.problem, "damaged": live.damaged},
        "judged": _judged(live),
        "shadow": {"waiting": live.shadow.waiting, "dropped": live.shadow.dropped},
    }  # fmt: skip


def _judged(live: LiveExperiment) -> Dump:
    """The monitor's state as JSON can hold it."""
    tree = asdict(live.judged)
    tree["srm_e_value"] = finite(tree["srm_e_value"])
    for key in ("contrasts", "guardrails"):
        for one in tree[key]:
            one |= {name: finite(value) for name, value in one.items() if isinstance(value, float)}
    return tree


def experiment_families(lives: Sequence[LiveExperiment]) -> list[Family]:
    """Prometheus: answers by experiment, arm, role and outcome; what was dropped."""
    answers: Counter[tuple[str, ...]] = Counter()
    for live in lives:
        answers.update({(live.record.id, *key): count for key, count in live.counts.items()})
    dropped = [((one.record.id, "log"), float(one.recorder.dropped)) for one in lives]
    dropped += [((one.record.id, "shadow"), float(one.shadow.dropped)) for one in lives]
    return [
        Family("counter", "experiment_answers", "Answers of an experiment's arms; outcome ok, or the error's code.",
               ("experiment", "arm", "role", "outcome"), [(key, count) for key, count in sorted(answers.items())]),
        Family("gauge", "experiment_split_evidence", "E-value against the split that was asked for: over 1 / srm_alpha "
               "no verdict may be drawn.", ("experiment",),
               [((one.record.id,), one.judged.srm_e_value) for one in lives]),
        Family("counter", "experiment_dropped", "Requests for which the log's buffer had no room, and copies for "
               "which the shadow's queue had none.", ("experiment", "what"), list(dropped)),
    ]  # fmt: skip
