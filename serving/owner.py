"""An endpoint that a driver deployed goes when the driver does, however that ended: Serve itself would keep it.

Each engine replica looks, for a driver that was killed can do nothing more. What a Serve config deployed has no owner.
"""

import asyncio
import logging

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RpcError
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

log = logging.getLogger("ray.serve")
LOOK_S = 2.0
_SPACE = b"graftwork-endpoints"


def this_driver() -> str:
    """Its id on this Ray."""
    return str(ray.get_runtime_context().get_job_id())


def claim(app: str) -> None:
    """Write down that this driver owns an application."""
    internal_kv._internal_kv_put(app.encode(), this_driver().encode(), overwrite=True, namespace=_SPACE)


def is_orphan(app: str) -> bool:
    """Whether an application was deployed by a driver that is gone."""
    owner = internal_kv._internal_kv_get(app.encode(), namespace=_SPACE)
    return owner is not None and _has_ended(owner.decode())


async def end_with(owner: str, app: str) -> None:
    """Delete the application once its owner has ended, and Serve with it where nothing else is served."""
    while not await asyncio.to_thread(_has_ended, owner):
        await asyncio.sleep(LOOK_S)
    log.warning("the driver %s of %r has ended: the endpoint goes", owner, app)
    await asyncio.to_thread(_delete, app)


def _delete(app: str) -> None:
    if set(serve.status().applications) - {app}:
        serve.delete(app, _blocking=False)
        return
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(wait=False))
    except (ValueError, RayActorError):
        return  # another replica was quicker


def _has_ended(owner: str) -> bool:
    """False where the GCS can't be asked now."""
    try:
        jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info(
            skip_submission_job_info_field=True, skip_is_running_tasks_field=True
        )
    except (RpcError, RayError):
        return False
    return any(job_id.hex() == owner and job.is_dead for job_id, job in jobs.items())
