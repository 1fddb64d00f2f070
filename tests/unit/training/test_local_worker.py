"""Resources of a single local worker: its GPUs, threads and peak memory. No Ray and no training is started here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.errors import ClusterError
from graftwork.training.local_worker import _environment, _reserve_resources, fit_in_process, needs_ray_train
from graftwork.training.run import ResolvedRun, _job
from graftwork.training.spec import TrainSpec
from tests.process_races import ROOT
from tests.training import task

PEAK = """
import subprocess, sys
taken = bytearray(b"x") * (300 << 20)
code = "from graftwork.environment import peak_rss_bytes; before = peak_rss_bytes(); own = b'x' * (101 << 20)"
subprocess.run([sys.executable, "-c", f"{code}; del own; print(before, peak_rss_bytes())"], check=True)
"""


def spec_of(gpus: float, cpus: float = 1.0) -> TrainSpec:
    given = {"name": "t", "base": "b", "data": {"train": "t.jsonl"}, "num_workers": 1, "gpus_per_worker": gpus}
    return TrainSpec.model_validate({**given, "cpus_per_worker": cpus})


def environment_of_worker(spec: TrainSpec) -> dict[str, str]:
    with _reserve_resources(spec) as reservation:
        return _environment(spec, reservation)


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 1, "0"),
        (None, 0.5, "0"),
        (None, 2, "0,1"),
        ("2,0", 1, "2"),
        ("GPU-5a, GPU-6b", 1, "GPU-5a"),
        (None, 0, None),
        ("1", 0, "1"),
    ],
)
def test_the_worker_gets_the_first_of_the_gpus_that_the_command_may_use(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: float, expected: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment_of_worker(spec_of(gpus)).get("CUDA_VISIBLE_DEVICES") == expected


def test_more_gpus_than_the_machine_has_are_refused(
    nvidia_smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(ResolvedRun.resolve(task(tmp_path / "task", num_workers=1, gpus_per_worker=4)), None)
    with pytest.raises(ClusterError, match="this machine has 3 GPU, the run needs 4"):
        fit_in_process(job)


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, "1"), (1.0, "1"), (2.5, "2"), (4.0, "4")])
def test_a_worker_has_as_many_threads_as_cpus_unless_the_environment_sets_them(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, cpus: float, threads: str
) -> None:
    """As Ray sets OMP_NUM_THREADS for its workers: sums in another order would round otherwise."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment_of_worker(spec_of(0, cpus))["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment_of_worker(spec_of(0, cpus))["OMP_NUM_THREADS"] == "7"


def test_ray_train_is_for_more_than_one_worker(nvidia_smi: Path) -> None:
    spec = spec_of(0)
    assert not needs_ray_train(spec)
    assert needs_ray_train(spec.with_({"num_workers": 2}))


def test_the_peak_of_a_process_leaves_out_what_its_parent_took() -> None:
    """Linux counts the parent's peak in ru_maxrss of a process started by vfork: a plan would learn a wrong figure."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    before, after = map(int, done.stdout.split())
    assert before < 100 << 20, "the parent's 300 MiB are not in it"
    # of 101 MiB: the kernel counts pages per CPU in batches, so that a past peak reads up to 0.3 MiB lower (Linux 6.18)
    assert 100 << 20 <= after - before < 110 << 20, "its own memory is, though it was freed"
