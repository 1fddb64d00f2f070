"""`graftwork doctor --target TARGET`: problems of a target, its store and the connection to it, each with a fix."""

from dataclasses import asdict

import typer

from graftwork.cli.jobs import Root, root_of
from graftwork.cli.launch import cluster_of
from graftwork.cli.options import ClusterConfig, JsonFlag, Target
from graftwork.cli.render import echo, print_error, print_json, show_findings
from graftwork.errors import ClusterError


def doctor(
    target: Target = "local", root: Root = None, cluster_config: ClusterConfig = None, as_json: JsonFlag = False
) -> None:
    """Diagnose a target, its object store and the connection to it, and suggest fixes. Starts no job.

    Exit codes: 0 jobs can run; 1 a problem prevents jobs from running; 3 the target does not answer.
    """
    from graftwork.cluster.jobs.backend import StoredBackend, probe_store
    from graftwork.cluster.jobs.environment import surroundings, versions
    from graftwork.cluster.targets import backend_of

    spec = cluster_of(cluster_config)
    where = root or spec.storage.uri or root_of(None)
    backend = backend_of(target, where, spec)
    assert isinstance(backend, StoredBackend)
    findings, unheard = [*surroundings(target, where, spec), *probe_store(where)], None
    try:
        findings += backend.place.doctor()
    except ClusterError as error:
        unheard = error
    here = versions()
    if as_json:
        print_json(
            {
                "on": target,
                "root": where,
                "versions": here,
                "findings": [asdict(one) for one in findings],
                "unheard": None if unheard is None else unheard.text(),
            }
        )
    else:
        echo(f"{target}, jobs in {where}")
        echo("  here: " + ", ".join(f"{name} {version}" for name, version in here.items()))
        show_findings(findings, "nothing is wrong" if unheard is None else "nothing else is wrong")
    if unheard is not None:
        print_error(unheard, as_json)
        raise typer.Exit(unheard.exit_code)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
