"""Options that several commands share, each declared once, and a decorator that adds them to a command.

`launching.LaunchOptions` lists the options of every stage command. A field added there is an option of all of them.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

SpecFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML spec of the stage; see examples/.")]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="Where to run: local (a private Ray), ray://HOST:PORT, http://HOST:PORT (the dashboard of a Ray), or "
        "k8s:CONTEXT/NAMESPACE.",
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
        "--deadline", metavar="TIME", help="Time limit, e.g. 2h. At the limit the job saves a checkpoint and stops."
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
Root = Annotated[str, typer.Option("--root", help="Object store: a folder, file:// or s3:// URI.")]
Alias = Annotated[str, typer.Option("--alias", help="Alias that will point at the new version.")]

RENAMED_FLAGS = {
    "--on": "--target",
    "--trials-on": "--trial-target",
    "--cluster": "--cluster-config",
    "--pending": "--queue-timeout",
}
"""Old flag -> new flag. An old flag is rejected with the new name."""
RENAMED_VERBS = {"command": "exec"}
"""Old verb -> new verb."""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with one command-line option per field for each parameter that is an options dataclass.

    A field is declared as a parameter of a typer command: `Annotated[type, typer.Option(...)]` with a default.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += _options_of(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        built = {name: cls(**{f.name: given.pop(f.name) for f in fields(cls)}) for name, cls in groups.items()}
        command(**given, **built)

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    vars(run)["__signature__"] = inspect.Signature(keyword)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
    return run


def _options_of(group: type) -> Iterator[inspect.Parameter]:
    hints, own = get_type_hints(group, include_extras=True), inspect.get_annotations(group)
    for field in sorted(fields(group), key=lambda field: field.name not in own):  # inherited ones last
        kind = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(field.name, kind, default=_default(field), annotation=hints[field.name])


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
