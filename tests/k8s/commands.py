"""Jobs that are programs of a line: quick ones, and ones that go on until they are told."""

from pathlib import Path

from graftwork.cluster.jobs.models import ExecSpec, Job
from graftwork.cluster.spec import ClusterSpec, StorageSpec

IMAGE = "registry.example/graftwork@sha256:" + "0" * 64

CLUSTER = ClusterSpec(image=IMAGE, storage=StorageSpec(claim="shared"))
"""Its store is a folder that head and workers share."""


def command(root: Path, name: str, program: str, cluster: ClusterSpec | None = None) -> Job:
    """`python -u -c PROGRAM` as a job."""
    spec = ExecSpec(name=name, root=str(root), argv=("python", "-u", "-c", program))
    return Job(
        name,
        "exec",
        spec.identity(),
        str(root),
        spec.model_dump(mode="json"),
        cluster or CLUSTER,
    )


def ends_with(file: Path) -> str:
    """A program that says `at work` and ends once the file is there."""
    return (
        f"import os, time; print('at work')\nwhile not os.path.exists({str(file)!r}): time.sleep(0.05)\nprint('done')"
    )
