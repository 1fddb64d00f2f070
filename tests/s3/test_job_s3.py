"""Jobs whose record is on S3: the store is looked at first, slow answers and outages neither hurt a job nor its log."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.cluster.jobs.backend import probe_store
from graftwork.cluster.jobs.packaging import publish_wheel, unpack, wheel_uri
from graftwork.cluster.jobs.store import LOG_BEHIND_S
from graftwork.errors import PreflightError
from graftwork.storage.store import Store
from tests.jobs import command_job, local_backend, printed, python_job
from tests.s3.conftest import use
from tests.s3_server import S3Server, running
from tests.s3_throttle_proxy import slow_down
from tests.waiting import until

CHATTY = """
import sys, time
for n in range({lines}):
    print(f'line {{n}} €', flush=True)
    time.sleep({pause})
"""


@pytest.fixture
def own_s3_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    """One that may be killed."""
    with running() as server:
        use(server, monkeypatch, tmp_path)
        yield server


def lines(count: int) -> str:
    return "".join(f"line {n} €\n" for n in range(count))


def test_a_good_store_has_no_finding_and_keeps_nothing_of_the_probe(s3_store: Store) -> None:
    assert probe_store(s3_store.uri) == []
    assert s3_store.list() == []


def test_a_bad_store_refuses_a_job_before_anything_is_written(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Store(s3_store.uri)
    assert good.list() == []
    with monkeypatch.context() as changed:
        changed.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        [denied] = probe_store(s3_store.uri)
        job = command_job(s3_store.uri, ["true"])
        assert [found.code for found in local_backend(s3_store.uri).plan(job).findings] == ["E-STORE-DENIED"]
    assert (denied.code, denied.level) == ("E-STORE-DENIED", "error")
    assert "AWS_SECRET_ACCESS_KEY" in denied.hint
    [missing] = probe_store("s3://no-such-bucket-here/x")
    assert missing.code == "E-STORE-FAILS"
    assert "no bucket" in missing.problem
    with pytest.raises(PreflightError, match="E-STORE-FAILS"):
        local_backend("s3://no-such-bucket-here/x").submit(command_job("s3://no-such-bucket-here/x", ["true"]))
    assert good.list() == []


@pytest.mark.long
def test_a_store_that_does_not_answer_is_told_from_a_bad_one(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert [found.code for found in probe_store(s3_store.uri)] == ["E-STORE-UNREACHABLE"]


def test_a_server_without_conditional_puts_is_refused(
    s3_store: Store, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_down(s3_env.endpoint, 0.0, conditions=False) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert [found.code for found in probe_store(s3_store.uri)] == ["E-STORE-NO-CONDITIONAL-PUT"]


def test_the_code_is_put_there_once_and_laid_out_where_it_runs(s3_store: Store, tmp_path: Path) -> None:
    uri = publish_wheel(s3_store)
    assert uri == publish_wheel(s3_store) == wheel_uri(s3_store)
    assert len(s3_store.list("code")) == 1
    unpack(uri, tmp_path / "code")
    assert (tmp_path / "code" / "graftwork" / "cluster" / "jobs" / "driver.py").is_file()


@pytest.mark.long
def test_one_answer_in_twenty_a_503_and_no_line_is_lost(
    s3_store: Store, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_down(s3_env.endpoint, 0.05) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        here, job = local_backend(s3_store.uri), python_job(s3_store.uri, CHATTY.format(lines=60, pause=0.1))
        here.submit(job)
        text = "".join(here.logs(job.job_id, follow=True))
        ended = here.status(job.job_id)
    assert (ended.state, ended.attempt) == ("succeeded", 1)
    assert text == lines(60)
    assert proxy.refused > 0


@pytest.mark.long
def test_a_server_killed_in_the_middle_costs_no_line(own_s3_server: S3Server) -> None:
    root = f"s3://{own_s3_server.bucket}/{secrets.token_hex(8)}"
    here, job = local_backend(root), python_job(root, CHATTY.format(lines=90, pause=0.1))
    here.submit(job)
    until(lambda: len(printed(root, job.job_id).splitlines()) > 10)
    own_s3_server.kill()
    time.sleep(2 * LOG_BEHIND_S)  # an outage, in which it prints on
    own_s3_server.start()
    ended = here.wait(job.job_id, timeout_s=120)
    assert (ended.state, ended.attempt) == ("succeeded", 1)
    assert printed(root, job.job_id) == lines(90)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_killed_ten_times_mid_upload_with_slow_answers_between(
    own_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large pieces, so that a kill meets an upload."""
    root, count = f"s3://{own_s3_server.bucket}/{secrets.token_hex(8)}", 40_000
    with slow_down(own_s3_server.endpoint, 0.05) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        here = local_backend(root)
        job = python_job(root, CHATTY.format(lines=count, pause=0.003).replace("€'", "€' + 'x' * 200"))
        here.submit(job)
        until(lambda: len(printed(root, job.job_id)) > 1000)
        for _ in range(10):
            time.sleep(4)
            own_s3_server.kill()
            time.sleep(4)
            own_s3_server.start()
        ended = here.wait(job.job_id, timeout_s=600)
        assert (ended.state, ended.attempt) == ("succeeded", 1)
        assert printed(root, job.job_id) == "".join(f"line {n} €{'x' * 200}\n" for n in range(count))
        assert proxy.refused > 0
