"""`python -m graftwork.cluster.places.drop SUBMISSION_ID` on a Ray: end the supervisor of a job that never started.

The Jobs API says True to a stop of a pending job and does nothing (ray#58353); it would start whenever it can. Its
supervisor is a named actor, which only somebody inside can kill; the API then shows the job as FAILED.
"""

import contextlib
import sys

NAMESPACE = "SUPERVISOR_ACTOR_RAY_NAMESPACE"
NAME = "_ray_internal_job_actor_{}"
"""As of Ray 2.60, dashboard/modules/job/common.py and ray_constants.py."""

if __name__ == "__main__":
    import ray

    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    with contextlib.suppress(ValueError):  # it has ended by itself
        ray.kill(ray.get_actor(NAME.format(sys.argv[1])), no_restart=True)
