"""Jobs for tests: a program of one's own, which needs no Ray inside."""

from collections.abc import Sequence
from typing import Any

from graftwork.cluster.backend import Job
from graftwork.cluster.command_spec import CommandSpec
from graftwork.cluster.spec import ClusterSpec


def command_job(root: str, argv: Sequence[str], *, name: str = "task", **cluster: Any) -> Job:
    """`argv` as a job; `cluster` are keys of the cluster's spec, e.g. limits={"deadline": "2s"}."""
    spec = CommandSpec(name=name, root=root, argv=tuple(argv))
    return Job(name, "command", spec.identity(), root, spec.model_dump(mode="json"), ClusterSpec(**cluster))
