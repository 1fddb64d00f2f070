"""Options that several commands share, each declared once, and a decorator that adds them to a command.

`LaunchOptions` lists the options of every stage command. A field added there is an option of all of them.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from graftwork.cluster.session import JOB, unknown_place
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import load
from graftwork.errors import ConfigError

SpecFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML spec of the stage; see examples/.")]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="Where to run: local (this machine), http(s)://HOST:PORT (dashboard of a Ray cluster), or "
        "k8s:CONTEXT/NAMESPACE (KubeRay).",
    ),
]
Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec, e.g. optim.lr=1e-3. Repeatable."),
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Run as a background job and return; follow it with `graftwork jobs`.")
]
ClusterConfig = Annotated[
    Path | None,
    typer.Option("--cluster-config", metavar="FILE", help="Cluster config file. Default: ./cluster.yaml, if present."),
]
Deadline = Annotated[
    str | None,
    typer.Option(
        "--deadline",
        metavar="TIME",
        help="Time limit, e.g. 2h. At the limit the job stops; a training run saves a checkpoint first.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option("--budget", metavar="USD", help="Cost limit, computed from `prices` of the cluster config."),
]
QueueTimeout = Annotated[
    str | None,
    typer.Option("--queue-timeout", metavar="TIME", help="Longest time that the job waits for resources, e.g. 15m."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text and tables.")]
Root = Annotated[str, typer.Option("--root", metavar="URI", help="Object store: a folder, file:// or s3:// URI.")]
Alias = Annotated[str, typer.Option("--alias", metavar="ALIAS", help="Alias to point at the new version.")]

RENAMED_FLAGS = {
    "--on": "--target",
    "--trials-on": "--trial-target",
    "--cluster": "--cluster-config",
    "--pending": "--queue-timeout",
}
"""Old flag -> new flag. An old flag is rejected with the new name."""
RENAMED_VERBS = {"command": "exec"}
"""Old verb -> new verb."""


CLUSTER_FILE = "cluster.yaml"
ELSEWHERE = ("http:", "https:", "k8s:")
"""Beginnings of the targets on which a driver runs the stage."""


@dataclass(frozen=True)
class StageOptions:
    """Options of `plan` and of every stage command."""

    sets: Sets = field(default_factory=list)
    cluster_config: ClusterConfig = None
    deadline: Deadline = None
    budget: Budget = None
    queue_timeout: QueueTimeout = None
    as_json: JsonFlag = False

    def job_flags(self) -> list[str]:
        """Return the given flags that apply to jobs only."""
        flags = {
            "--cluster-config": self.cluster_config,
            "--deadline": self.deadline,
            "--budget": self.budget,
            "--queue-timeout": self.queue_timeout,
        }
        return [flag for flag, value in flags.items() if value is not None]


@dataclass(frozen=True)
class LaunchOptions(StageOptions):
    """Options of every stage command: a field added here or to StageOptions is an option of all of them."""

    target: Target = "local"
    detach: Detach = False

    @property
    def is_job(self) -> bool:
        """Return whether a driver runs the stage: on a cluster or in the background.

        Raises ConfigError for flags without effect.
        """
        if self.target.startswith(ELSEWHERE):
            return True
        if self.target not in ("local", JOB):
            raise unknown_place(self.target)
        if (flags := self.job_flags()) and not self.detach:
            raise ConfigError(
                f"{', '.join(flags)} with --target {self.target}",
                "it would have no effect",
                "limits and prices are a job's, and this command runs the stage itself",
                "add --detach",
            )
        return self.detach

    def cluster_spec(self) -> ClusterSpec:
        """Return the cluster config with the limits of the command line. Raises ConfigError."""
        given = {
            "limits.deadline": self.deadline,
            "limits.budget_usd": self.budget,
            "limits.pending": self.queue_timeout,
        }
        spec = cluster_of(self.cluster_config)
        if self.budget is not None and spec.prices is None:
            raise ConfigError(
                f"--budget {self.budget:g}",
                "the cluster config has no prices",
                "a budget is computed from a price table",
                "add prices: {gpu_hour: {H100: ...}}",
            )
        return spec.with_({key: value for key, value in given.items() if value is not None})


def cluster_of(file: Path | None) -> ClusterSpec:
    """Return the cluster config: `file`, else cluster.yaml of the current folder, else the defaults."""
    found = file or (Path(CLUSTER_FILE) if Path(CLUSTER_FILE).is_file() else None)
    if found is None:
        return ClusterSpec()
    spec = load(found, expect="cluster")
    assert isinstance(spec, ClusterSpec)
    return spec


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with one command-line option per field for each parameter that is an options dataclass.

    A field is declared as a parameter of a typer command: `Annotated[type, typer.Option(...)]` with a default.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        group, annotations = groups[name], get_type_hints(groups[name], include_extras=True)
        own = inspect.get_annotations(group)
        for one in sorted(fields(group), key=lambda one: one.name not in own):  # inherited ones last
            default = inspect.Parameter.empty if one.default is MISSING else one.default
            default = one.default_factory() if one.default_factory is not MISSING else default
            keyword_only = inspect.Parameter.KEYWORD_ONLY
            parameters.append(
                inspect.Parameter(one.name, keyword_only, default=default, annotation=annotations[one.name])
            )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        built = {name: cls(**{f.name: given.pop(f.name) for f in fields(cls)}) for name, cls in groups.items()}
        command(**given, **built)

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    vars(run)["__signature__"] = inspect.Signature(keyword)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
    return run
