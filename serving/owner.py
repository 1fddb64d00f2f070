"""An endpoint that a driver deployed goes when the driver does, however that ended: Serve itself would keep it.

Each engine replica looks, for a driver that was killed can do nothing more. What a Serve config deployed has no owner.
"""

import asyncio
import logging

import ray
from ray import serve
from ray.exceptions import RayActorError

from graftwork.compat.ray import job_has_ended, table_get, table_put
from graftwork.compat.ray_serve import delete_application, end_serve

log = logging.getLogger("ray.serve")
OWNER_POLL_INTERVAL_S = 2.0
_SPACE = "graftwork-endpoints"


def this_driver() -> str:
    """Its id on this Ray."""
    return str(ray.get_runtime_context().get_job_id())


def claim(app: str) -> None:
    """Write down that this driver owns an application."""
    table_put(_SPACE, app, this_driver())


def is_orphan(app: str) -> bool:
    """Whether an application was deployed by a driver that is gone."""
    owner = table_get(_SPACE, app)
    return owner is not None and job_has_ended(owner)


async def end_with(owner: str, app: str) -> None:
    """Delete the application once its owner has ended, and Serve with it where nothing else is served."""
    while not await asyncio.to_thread(job_has_ended, owner):
        await asyncio.sleep(OWNER_POLL_INTERVAL_S)
    log.warning("the driver %s of %r has ended: the endpoint goes", owner, app)
    await asyncio.to_thread(_delete, app)


def _delete(app: str) -> None:
    if set(serve.status().applications) - {app}:
        delete_application(app)
        return
    try:
        end_serve()
    except (ValueError, RayActorError):
        return  # another replica was quicker
