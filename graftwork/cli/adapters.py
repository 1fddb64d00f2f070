"""`graftwork adapters ls|show|verify|promote|rm`: the published adapters of a root."""

from typing import Annotated

import typer

from graftwork import artifact
from graftwork.cli.output import JsonFlag, gib, print_json, print_table, say
from graftwork.errors import ArtifactError
from graftwork.storage import DEFAULT_ROOT, Store

app = typer.Typer(help="List, inspect, verify, promote and remove published adapters.", no_args_is_help=True)
Root = Annotated[str, typer.Option("--root", help="The store: a folder, file:// or s3://.")]
Ref = Annotated[str, typer.Argument(metavar="TASK@REF", help="Task and alias or version, e.g. airport-card@latest.")]


@app.command("ls")
def list_(root: Root = DEFAULT_ROOT, as_json: JsonFlag = False) -> None:
    """Every published version, newest last, with the aliases that point at it."""
    store = Store(root)
    manifests = artifact.list_adapters(store)
    named = {task: artifact.aliases(store, task) for task in {m.task for m in manifests}}
    rows = [
        (
            m.task,
            m.version,
            ",".join(sorted(a for a, v in named[m.task].items() if v == m.version)) or "-",
            m.method.get("kind", "-"),
            m.method.get("rank", "-"),
            m.base_digest[:12],
            gib(sum(f.size_bytes for f in m.files.values())),
            m.created_at,
        )
        for m in manifests
    ]
    if as_json:
        print_json(
            [
                {**m.model_dump(mode="json"), "aliases": sorted(a for a, v in named[m.task].items() if v == m.version)}
                for m in manifests
            ]
        )
    elif rows:
        print_table(
            f"adapters in {store.uri}", ("task", "version", "alias", "method", "rank", "base", "size", "created"), rows
        )
    else:
        say(f"no adapters in {store.uri}: `graftwork train FILE` publishes one")


@app.command()
def show(ref: Ref, root: Root = DEFAULT_ROOT) -> None:
    """The manifest of one version."""
    print_json(artifact.resolve(Store(root), ref).model_dump(mode="json"))


@app.command()
def verify(ref: Ref, root: Root = DEFAULT_ROOT, as_json: JsonFlag = False) -> None:
    """Read every byte: sha256 of each file, safetensors headers, shapes. Exit 2 lists the problems."""
    store = Store(root)
    manifest = artifact.resolve(store, ref)
    problems = artifact.verify(store, manifest.task, manifest.version)
    if problems:
        raise ArtifactError(
            f"verify {ref} (version {manifest.version})",
            "; ".join(problems),
            "every file must match the manifest",
            "publish it again from its run",
        )
    if as_json:
        print_json({"ref": ref, "version": manifest.version, "ok": True, "files": sorted(manifest.files)})
    else:
        say(f"ok: {manifest.task}@{manifest.version}, {len(manifest.files)} files verified")


@app.command()
def promote(
    ref: Ref, alias: Annotated[str, typer.Argument(help="Alias to move, e.g. prod.")], root: Root = DEFAULT_ROOT
) -> None:
    """Point an alias at a version, atomically. Running requests finish on the version they began with."""
    store = Store(root)
    manifest = artifact.resolve(store, ref)
    before = artifact.aliases(store, manifest.task).get(alias, "nothing")
    artifact.promote(store, manifest.task, alias, manifest.version)
    say(f"{manifest.task}@{alias}: {before} -> {manifest.version}")


@app.command("rm")
def remove(ref: Ref, root: Root = DEFAULT_ROOT) -> None:
    """Delete one version; refused while an alias points at it."""
    store = Store(root)
    task, version = artifact.locate(store, ref)  # not opened: a damaged version too can be removed
    artifact.remove(store, task, version)
    say(f"removed {task}@{version}")
