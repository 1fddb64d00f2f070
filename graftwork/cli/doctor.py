"""`graftwork doctor --on WHERE`: what is wrong with a place, its store and this machine's way there, and the mend."""

from dataclasses import asdict

import typer

from graftwork.cli.findings import show_findings
from graftwork.cli.jobs import Root, root_of
from graftwork.cli.launching import cluster_of
from graftwork.cli.output import Cluster, JsonFlag, On, print_error, print_json, say
from graftwork.errors import ClusterError


def doctor(on: On = "local", root: Root = None, cluster: Cluster = None, as_json: JsonFlag = False) -> None:
    """Look at a place, its store and the way there; say what is wrong and how to mend it. Starts no job.

    Exit code 0: nothing keeps jobs from running; 1: something does; 3: the place does not answer.
    """
    from graftwork.cluster.places import backend_of
    from graftwork.cluster.probe import probe_store
    from graftwork.cluster.stored import StoredBackend
    from graftwork.cluster.surroundings import surroundings, versions

    spec = cluster_of(cluster)
    where = root or spec.storage.uri or root_of(None)
    backend = backend_of(on, where, spec)
    assert isinstance(backend, StoredBackend)
    findings, unheard = [*surroundings(on, where, spec), *probe_store(where)], None
    try:
        findings += backend.place.doctor()
    except ClusterError as error:
        unheard = error
    here = versions()
    if as_json:
        print_json({"on": on, "root": where, "versions": here, "findings": [asdict(one) for one in findings],
                    "unheard": None if unheard is None else unheard.text()})  # fmt: skip
    else:
        say(f"{on}, jobs in {where}")
        say("  here: " + ", ".join(f"{name} {version}" for name, version in here.items()))
        show_findings(findings, "nothing is wrong" if unheard is None else "nothing else is wrong")
    if unheard is not None:
        print_error(unheard, as_json)
        raise typer.Exit(unheard.exit_code)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
