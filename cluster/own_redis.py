"""Redis' password for the head's GCS alone, by its environment: Ray would write it on command lines."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

WRITTEN_AS = ("--redis-password", "--ray_redis_password", "ray.redis.password")
"""In the raylet's arguments: the command lines of workers in Python, C++ and Java."""


@contextlib.contextmanager
def password_unseen(password: str) -> Iterator[None]:
    """Start Ray's processes without the password in their arguments, which every user of the machine can list.

    Ray writes it on the lines of gcs_server and of the raylet, which hands it to workers (Ray 2.60, services.py).
    gcs_server reads its flags by gflags, also from the environment (`--fromenv`); the others have no use for it.
    """
    if not password:
        yield
        return
    from ray._private import services

    before = services.start_ray_process

    def start(command: list[str], *args: Any, env_updates: Mapping[str, str] | None = None, **kwargs: Any) -> Any:
        own = f"--redis_password={password}"
        if own in command:
            command = ["--fromenv=redis_password" if word == own else word for word in command]
            env_updates = {**(env_updates or {}), "FLAGS_redis_password": password}
        for name in WRITTEN_AS:
            command = [word.replace(f"{name}={password}", f"{name}=") for word in command]
        return before(command, *args, env_updates=env_updates, **kwargs)

    services.start_ray_process = start
    try:
        yield
    finally:
        services.start_ray_process = before
