"""Trials that are gangs: an object each, in one queue, found by their sweep."""

from dataclasses import replace

from graftwork.cluster.backend import Attempt, Demand
from graftwork.cluster.kuberay.rules import check_rules
from graftwork.cluster.kuberay.schema import check_schema
from graftwork.cluster.kuberay.trials import build_trial_rayjobs, check_trials, is_gang
from tests.kuberay_objects import GPUS, cluster, job


def trials(queue: str | None, gpus: int = 1) -> dict[str, Attempt]:
    demand = Demand(num_workers=2, gpus_per_worker=1.0)
    base = job(cluster(workers=[{**GPUS, "gpu": gpus}], queue=queue), name="airport-trial", demand=demand)
    return {f"t{index}": Attempt(replace(base, digest=f"{index}" * 64), 1) for index in range(3)}


def test_each_trial_is_an_object_that_its_sweep_finds() -> None:
    made = build_trial_rayjobs("sweep-0123456789", trials("gpu"), "team-a", None)
    assert [one["metadata"]["labels"]["graftwork.dev/trial"] for one in made] == ["t0", "t1", "t2"]
    assert {one["metadata"]["labels"]["graftwork.dev/sweep"] for one in made} == {"sweep-0123456789"}
    assert len({one["metadata"]["name"] for one in made}) == 3
    for one in made:
        assert one["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
        assert one["spec"]["suspend"] is True
        assert [*check_rules(one), *check_schema(one)] == []


def test_gangs_without_a_queue_would_wait_for_each_other() -> None:
    assert check_trials(trials("gpu")) == []
    assert [found.code for found in check_trials(trials(None))] == ["E-TRIALS-NO-QUEUE"]
    twice = dict.fromkeys(("a", "b"), trials("gpu")["t0"])
    assert [found.code for found in check_trials(twice)] == ["E-TRIALS-ONE-NAME"]


def test_a_trial_on_one_machine_is_no_gang() -> None:
    assert is_gang(trials("gpu")["t0"])
    assert not is_gang(trials("gpu", gpus=2)["t0"])
