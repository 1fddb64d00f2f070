"""Ctrl-C in a program that has its own use for Ray afterwards."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import ray

from graftwork.cluster.session import Session
from graftwork.errors import Interrupted
from graftwork.training.report import Progress
from graftwork.training.run import train
from tests.training import task
from tests.waiting import until

WITHIN_S = 120.0


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """Also where the tests were started in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_ctrl_c_leaves_no_thread_in_ray_and_gives_the_places_back(
    ray_cluster: Session, ctrl_c_raises: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A thread that is in `ray.get` while Ray is shut down can hang the process at its exit, or end it at once."""
    spec = task(tmp_path_factory.mktemp("interrupt"), **{"optim.epochs": 40, "num_workers": 2, "checkpoint_every": 200})
    threads, sent = set(threading.enumerate()), threading.Event()

    def interrupt(_: Progress) -> None:
        if not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="no checkpoint was made yet"):
        train(spec, on_progress=interrupt)
    assert [thread.name for thread in threading.enumerate() if thread not in threads] == []
    until(lambda: ray.available_resources().get("CPU") == 4.0, "the workers are gone", within_s=WITHIN_S)
