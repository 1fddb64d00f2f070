"""What a job would take is said before, and what would not run is refused before anything is written."""

import pytest

from graftwork.cluster.jobs.models import Demand
from graftwork.errors import PreflightError
from tests.backends.local_target import Here

TOO_MUCH = Demand(num_workers=3, gpus_per_worker=64)


@pytest.mark.core
def test_a_plan_writes_nothing(here: Here) -> None:
    job = here.python("pass")
    plan = here.backend.plan(job)
    assert (plan.job_id, plan.attempt, plan.exists) == (job.job_id, 1, False)
    assert not [finding for finding in plan.findings if finding.level == "error"]
    assert here.everything() == b""
    assert here.backend.list() == []


def test_a_plan_of_a_job_that_is_there_says_so(here: Here) -> None:
    job = here.python("pass")
    here.run(job)
    here.nothing_left(job.job_id)  # its driver writes until it ends
    before = here.everything()
    plan = here.backend.plan(job)
    assert (plan.attempt, plan.exists) == (1, True)
    assert here.everything() == before


@pytest.mark.core
@pytest.mark.parametrize(("demand", "word"), [(TOO_MUCH, "GPU"), (Demand(memory_bytes_per_worker=2**50), "GiB")])
def test_a_job_that_cannot_fit_is_refused_before_anything_is_written(here: Here, demand: Demand, word: str) -> None:
    job = here.python("pass", demand=demand)
    with pytest.raises(PreflightError) as caught:
        here.backend.submit(job)
    assert caught.value.exit_code == 2
    assert all(finding["code"].startswith("E-") for finding in caught.value.findings)
    assert word in str(caught.value)
    assert here.everything() == b""
    assert here.processes(job.job_id) == []


def test_a_plan_has_the_findings_that_refuse_it(here: Here) -> None:
    findings = here.backend.plan(here.python("pass", demand=TOO_MUCH)).findings
    errors = [finding for finding in findings if finding.level == "error"]
    assert errors
    assert all(finding.problem and finding.hint for finding in errors)


def test_a_plan_of_a_job_with_prices_and_a_time_has_its_cost(here: Here) -> None:
    hour = Demand(seconds=3600)
    plan = here.backend.plan(here.python("pass", demand=hour, prices={"cpu_hour": 0.5}, limits={"deadline": "2h"}))
    assert plan.usd is not None
    assert plan.most_usd == pytest.approx(2 * plan.usd)


def test_the_doctor_finds_no_error_in_a_place_that_works(here: Here) -> None:
    findings = here.backend.place.doctor()
    assert not [finding for finding in findings if finding.level == "error"]
    assert all(finding.hint for finding in findings)
