"""A pod that ends tells Ray first, and waits while it is used: the preStop hook on a real Ray of several nodes."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from graftwork.cluster.kuberay.prestop import GCS_S
from tests.process_races import ROOT
from tests.ray_cluster import Raylets, environment
from tests.waiting import until

pytestmark = pytest.mark.long
WITHIN_S = 60
DRAIN = ("-m", "graftwork.cluster.kuberay.prestop")
GIVES_UP_S = GCS_S + 12
"""From the start of a drain: three seconds without the GCS, and the start of Python and Ray on a loaded machine."""
WORK = """
import sys
import ray
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=1)
class Work:
    def here(self): return ray.get_runtime_context().get_node_id()

work = Work.options(scheduling_strategy=NodeAffinitySchedulingStrategy(sys.argv[1], soft=False)).remote()
print(ray.get(work.here.remote()), flush=True)
for line in sys.stdin:
    if line == "told\\n":
        print(sys.argv[1] in state.get_draining_nodes(), flush=True)
    else:
        ray.kill(work)
        break
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    made = Raylets()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def killable_raylets() -> Iterator[Raylets]:
    """A Ray whose head does not survive the test."""
    made = Raylets()
    try:
        yield made
    finally:
        made.close()


def python(raylets: Raylets, *words: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**environment(), "RAY_ADDRESS": raylets.address},
        text=True,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe if DRAIN[1] in words else None,
    )


def said(work: "subprocess.Popen[str]", word: str = "") -> str:
    """What the work answers to a word."""
    assert work.stdin is not None
    assert work.stdout is not None
    if word:
        work.stdin.write(f"{word}\n")
        work.stdin.flush()
    return work.stdout.readline().strip()


def test_a_node_at_work_is_told_and_waited_for(raylets: Raylets) -> None:
    node = raylets.add()
    work = python(raylets, "-c", WORK, node.node_id)
    try:
        assert said(work) == node.node_id
        drain = python(raylets, *DRAIN, "120", node.node_id)
        until(lambda: said(work, "told") == "True", "Ray was not told", within_s=WITHIN_S)
        assert drain.poll() is None
        work.communicate("end\n", timeout=WITHIN_S)
        assert drain.wait(WITHIN_S) == 0
    finally:
        work.kill()


def test_a_node_without_work_is_not_waited_for(raylets: Raylets) -> None:
    drain = python(raylets, *DRAIN, "600", raylets.add().node_id)
    assert drain.wait(WITHIN_S) == 0


def test_work_that_does_not_end_is_left_to_its_fate(raylets: Raylets) -> None:
    node = raylets.add()
    work = python(raylets, "-c", WORK, node.node_id)
    try:
        assert said(work) == node.node_id
        assert python(raylets, *DRAIN, "2", node.node_id).wait(WITHIN_S) == 1
    finally:
        work.kill()


def test_a_drain_whose_head_goes_away_gives_up(killable_raylets: Raylets) -> None:
    """The end of a RayJob: the head's pod and the workers' get their notice together, and the head is gone first."""
    node = killable_raylets.add()
    work = python(killable_raylets, "-c", WORK, node.node_id)
    try:
        assert said(work) == node.node_id
        drain = python(killable_raylets, *DRAIN, "110", node.node_id)
        until(lambda: said(work, "told") == "True", "Ray was not told", within_s=WITHIN_S)
        assert drain.poll() is None
        killable_raylets.gcs().kill()
        gives_up(drain, "has not answered for")
        gives_up(
            python(killable_raylets, *DRAIN, "110"), "has not answered for"
        )  # the head was gone before the drain began
    finally:
        work.kill()


def test_a_drain_ends_in_its_time_where_the_head_hangs(killable_raylets: Raylets) -> None:
    killable_raylets.add()
    killable_raylets.gcs().suspend()
    try:
        gives_up(python(killable_raylets, *DRAIN, "3"), "time is up")
    finally:
        killable_raylets.gcs().resume()


def gives_up(drain: "subprocess.Popen[str]", why: str) -> None:
    began = time.monotonic()
    try:
        _, errors = drain.communicate(timeout=GIVES_UP_S)
    finally:
        drain.kill()
    print(f"gave up after {time.monotonic() - began:.1f} s: {errors.strip()[-200:]}")
    assert drain.returncode == 1
    assert why in errors
