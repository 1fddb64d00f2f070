"""Which job a person means, and what is said where there is none or are several."""

import time
from pathlib import Path

import pytest

from graftwork.cli.jobs import job_called
from graftwork.cluster.jobs.models import Job
from graftwork.cluster.jobs.store import JobStore
from graftwork.errors import ConfigError


@pytest.fixture
def runs(tmp_path: Path) -> JobStore:
    """cards twice, the second one later and with two attempts; cars-b once."""
    runs = JobStore(str(tmp_path))
    for name, digest in (("cards", "a" * 64), ("cards", "ab" * 32), ("cars-b", "c" * 64)):
        runs.record(Job(name, "exec", digest, str(tmp_path), {"argv": ["true"]}), "local")
        runs.open_attempt(f"{name}-{digest[:10]}", 1)
        time.sleep(0.002)
    runs.open_attempt("cards-ababababab", 2)
    return runs


@pytest.mark.parametrize(
    ("said", "job_id", "attempt"),
    [
        ("cards-aaaaaaaaaa", "cards-aaaaaaaaaa", None),
        ("cards-ababababab-a1", "cards-ababababab", 1),
        ("cards-aba", "cards-ababababab", None),
        ("cards", "cards-ababababab", None),
        ("cards-a2", "cards-ababababab", 2),
        ("cars-b", "cars-b-cccccccccc", None),
        ("cars", "cars-b-cccccccccc", None),
    ],
)
def test_a_job_is_found(runs: JobStore, said: str, job_id: str, attempt: int | None) -> None:
    assert job_called(runs, said) == (job_id, attempt)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ca", ["3 jobs begin so", "cars-b-cccccccccc"]),
        ("crads", ["has 3 jobs and none of that name", "did you mean 'cards'?", "--root"]),
        ("cards-ababababab-a9", ["has no attempt 9", "its attempts: 1, 2"]),
        ("", ["3 jobs"]),
    ],
)
def test_what_is_no_job_is_told(runs: JobStore, said: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        job_called(runs, said)
    for word in words:
        assert word in str(refused.value)


def test_an_empty_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no jobs"):
        job_called(JobStore(str(tmp_path)), "cards")
