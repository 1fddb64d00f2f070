"""Hooks into Ray Train, on one real training with a worker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import train
from ray.train import ControllerError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from graftwork.cluster.private_ray import private_ray
from graftwork.compat import ray_train


@pytest.fixture(scope="module")
def private() -> Iterator[str]:
    if ray.is_initialized():  # tests/ray ran before in this process
        yield ""
        return
    with private_ray(num_cpus=3) as address:
        yield address


@pytest.mark.long
def test_a_training_with_all_hooks(private: str, tmp_path: Path) -> None:
    def start() -> None:
        import os
        import threading

        main = threading.current_thread() is threading.main_thread()
        os.environ["COMPAT_STARTED"] = f"main={main} group={os.environ.get('MASTER_ADDR')}"

    def work(config: dict[str, Any]) -> dict[str, Any]:
        import os
        import threading

        from ray.train.v2._internal.execution.context import get_train_context
        from ray.train.v2._internal.execution.preemption import PreemptionInfo

        from graftwork.compat.ray_train import node_is_draining

        before = node_is_draining()
        get_train_context().preemption_context.preemption_info = PreemptionInfo(None, {"node": [0]})
        return {
            "started": os.environ["COMPAT_STARTED"],
            "main": threading.current_thread() is threading.main_thread(),
            "draining": [before, node_is_draining()],
            "public": train.get_preemption_info() is not None,
        }

    controllers: list[Any] = []
    trainer = TorchTrainer(
        work,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=train.RunConfig(storage_path=str(tmp_path), callbacks=[ray_train.AtWorkerStart(start)]),
    )
    usual = {type(one) for one in trainer._create_default_callbacks()}
    ray_train.on_controller(trainer, controllers.append)
    ray_train.without_idle_helpers(trainer)
    left_out = usual - {type(one) for one in trainer._create_default_callbacks()}
    assert left_out == {DatasetsCallback, PlacementGroupCleanerCallback}
    found = trainer.fit().return_value
    assert found == {"started": "main=True group=None", "main": False, "draining": [False, True], "public": True}
    [controller] = controllers
    assert hasattr(controller, "abort")
    assert ray.is_initialized()


def test_workers_that_did_not_start_are_told_from_other_failures() -> None:
    assert ray_train.workers_did_not_start(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert ray_train.workers_did_not_start(ControllerError(WorkerGroupStartupFailedError("a node is gone")))
    assert not ray_train.workers_did_not_start(ControllerError(RuntimeError("other")))
    assert not ray_train.workers_did_not_start(train.TrainingFailedError("a worker raised"))
