"""A pod that ends tells Ray first, and waits while it is used: the preStop hook on a real Ray of several nodes."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.processes import ROOT
from tests.raylets import Raylets, environment

pytestmark = pytest.mark.long
WITHIN_S = 60
PROGRAM = """
import sys
from graftwork.cluster.drain import drain
sys.exit(not drain(float(sys.argv[1]), sys.argv[2]))
"""
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


def python(raylets: Raylets, program: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *words], cwd=ROOT, env={**environment(), "RAY_ADDRESS": raylets.address},
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


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
    work = python(raylets, WORK, node.node_id)
    try:
        assert said(work) == node.node_id
        drain = python(raylets, PROGRAM, "120", node.node_id)
        end = time.monotonic() + WITHIN_S
        while said(work, "told") != "True":
            assert time.monotonic() < end, "Ray was not told"
            time.sleep(0.1)
        assert drain.poll() is None
        work.communicate("end\n", timeout=WITHIN_S)
        assert drain.wait(WITHIN_S) == 0
    finally:
        work.kill()


def test_a_node_without_work_is_not_waited_for(raylets: Raylets) -> None:
    drain = python(raylets, PROGRAM, "600", raylets.add().node_id)
    assert drain.wait(WITHIN_S) == 0


def test_work_that_does_not_end_is_left_to_its_fate(raylets: Raylets) -> None:
    node = raylets.add()
    work = python(raylets, WORK, node.node_id)
    try:
        assert said(work) == node.node_id
        assert python(raylets, PROGRAM, "2", node.node_id).wait(WITHIN_S) == 1
    finally:
        work.kill()
