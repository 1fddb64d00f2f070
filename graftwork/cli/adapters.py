"""`graftwork adapters ls|show|verify|promote|rollback|rm|merge|publish` on a root, and the verbs of a running endpoint.

With `--endpoint` a verb goes to the endpoint, which does it on every replica; its admin token is read from the
environment variable that `--token-env` names.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from graftwork.artifacts.manifest import aliases, roll_back
from graftwork.artifacts.registry import locate, resolve, verify_adapter
from graftwork.cli.options import Alias, JsonFlag, Root
from graftwork.cli.render import echo, gib, print_json, print_table
from graftwork.errors import ArtifactError, ConfigError
from graftwork.storage.store import DEFAULT_ROOT, Store


def publish(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder with adapter_config.json and adapter_model.safetensors.")
    ],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task to publish it under.")],
    base: Annotated[str, typer.Option("--base", metavar="URI", help="Base that the adapter was trained on.")],
    alias: Alias = "latest",
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt that the adapter was trained with.")
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Round the LoRA weights to bfloat16. Halves the size; makes a different version."),
    ] = False,
    root: Root = DEFAULT_ROOT,
    as_json: JsonFlag = False,
) -> None:
    """Publish a PEFT adapter folder, so that endpoints on the same base can serve it."""
    from graftwork import environment
    from graftwork.artifacts.publish import publish as publish_adapter
    from graftwork.base import load as base_model
    from graftwork.base.source import BaseSpec
    from graftwork.prompts.render import PromptSpec
    from graftwork.serving.engine.adapters.format import ConfigFile

    resolved = base_model.resolve(BaseSpec(uri=base))
    template = base_model.template(resolved)
    config = ConfigFile.read(folder).values
    with tempfile.TemporaryDirectory(prefix="gw-publish-") as name:
        made = publish_adapter(
            Store(root),
            task,
            _round_to_bf16(folder, Path(name)) if bf16 else folder,
            base_digest=resolved.digest,
            quant={"kind": "none"},
            template_digest=template.digest,
            tokenizer_digest=template.tokenizer_digest,
            template_date=template.date,
            method={"kind": str(config.get("peft_type", "unknown")).lower(), "rank": config.get("r")},
            prompt=PromptSpec(system=system).model_dump(mode="json"),
            data_fingerprint="unknown",
            metrics={},
            run="published by hand",
            provenance=environment.collect(0),
            alias=alias,
        )
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    echo(f"published {made.ref}, alias {task}@{alias}")


def _round_to_bf16(folder: Path, into: Path) -> Path:
    """Write the folder's files with the LoRA weights in bf16."""
    import torch
    from safetensors.torch import save_file

    from graftwork.artifacts.verify import CONFIG_FILE, WEIGHTS_FILE
    from graftwork.serving.engine.adapters.weights_file import read_tensors

    halves = (".lora_A.weight", ".lora_B.weight")
    found = read_tensors(folder / WEIGHTS_FILE)
    rounded = {key: value.to(torch.bfloat16) if key.endswith(halves) else value for key, value in found.items()}
    save_file({key: value.contiguous() for key, value in rounded.items()}, into / WEIGHTS_FILE, {"format": "pt"})
    (into / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    return into


def merge(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Task to publish the merged adapter under.")],
    refs: Annotated[list[str], typer.Argument(metavar="TASK@REF...", help="Two or more adapters of the same base.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="cat (exact sum), svd (best approximation of a lower rank), linear, ties, dare_linear, dare_ties or "
            "magnitude_prune. The last four also with the suffix _svd.",
        ),
    ] = "cat",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="W,W...", help="One weight per adapter. Default: equal weights that sum to 1."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Fraction of entries that ties, dare and magnitude_prune keep.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Rank of the result, for the svd methods. Default: the largest input rank."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed for the entries that dare drops.")] = 0,
    alias: Alias = "latest",
    root: Root = DEFAULT_ROOT,
    as_json: JsonFlag = False,
) -> None:
    """Merge LoRA adapters into one and publish it. The manifest lists the merged versions."""
    from graftwork.training.adapters.merge import MergeSpec, merge_published

    spec = MergeSpec.create(method, len(refs), _numbers(weights), density, rank, seed)
    done = merge_published(Store(root), out, refs, spec, alias=alias)
    if as_json:
        print_json({**done.manifest.model_dump(mode="json"), "notes": done.notes})
        return
    parts = " + ".join(f"{weight:g} {ref}" for weight, ref in zip(spec.weights, done.manifest.merged_from, strict=True))
    echo(f"{done.manifest.ref} = {parts}")
    echo(f"  by {spec.method}, rank {done.rank}; {done.distance:.2%} away from the sum of the weighted deltas")
    for note in done.notes:
        echo(f"  {note}")


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--weights {text}", "it is no list of numbers", "write --weights 0.7,0.3") from None


app = typer.Typer(help="List, verify, promote and remove adapters, here or on an endpoint.", no_args_is_help=True)
app.command()(merge)
app.command()(publish)
Endpoint = Annotated[str, typer.Option("--endpoint", metavar="URL", help="URL of a running endpoint.")]
MaybeEndpoint = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="URL of a running endpoint, to use instead of --root.")
]
TokenEnv = Annotated[
    str, typer.Option("--token-env", metavar="NAME", help="Environment variable with the admin token.")
]
ADMIN_TOKEN = "GRAFTWORK_ADMIN_TOKEN"
Ref = Annotated[str, typer.Argument(metavar="TASK@REF", help="Task and alias or version, e.g. airport-card@latest.")]


@app.command("ls")
def list_(
    root: Root = DEFAULT_ROOT,
    endpoint: MaybeEndpoint = None,
    token_env: TokenEnv = ADMIN_TOKEN,
    as_json: JsonFlag = False,
) -> None:
    """List published versions, newest last, with the aliases that point at them."""
    from graftwork.artifacts.registry import Listing

    if endpoint is not None:
        _show_registered(endpoint, token_env, as_json)
        return
    store = Store(root)
    found = Listing(store).read()
    rows = [
        (
            m.task,
            m.version,
            ",".join(aliases) or "-",
            m.method.get("kind", "-"),
            m.method.get("rank", "-"),
            m.base_digest[:12],
            gib(sum(f.size_bytes for f in m.files.values())),
            m.created_at,
        )
        for m, aliases in found
    ]
    if as_json:
        print_json([{**m.model_dump(mode="json"), "aliases": aliases} for m, aliases in found])
    elif rows:
        print_table(
            f"adapters in {store.uri}", ("task", "version", "alias", "method", "rank", "base", "size", "created"), rows
        )
    else:
        echo(f"no adapters in {store.uri}: `graftwork train FILE` publishes one")


@app.command()
def show(ref: Ref, root: Root = DEFAULT_ROOT) -> None:
    """Print the manifest and lineage of one version: the adapters it was trained from or merged from, and its base."""
    from graftwork.artifacts import registry

    store = Store(root)
    found = resolve(store, ref)
    family = {**registry.tree(store, found), "base": registry.base(store, found.base_digest)}
    print_json({**found.model_dump(mode="json"), "ancestry": family})


@app.command()
def verify(ref: Ref, root: Root = DEFAULT_ROOT, as_json: JsonFlag = False) -> None:
    """Verify the sha256 of each file, the safetensors headers and the tensor shapes. Exits with 2 if one is wrong."""
    store = Store(root)
    manifest = resolve(store, ref)
    problems = verify_adapter(store, manifest.task, manifest.version)
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
        echo(f"ok: {manifest.task}@{manifest.version}, {len(manifest.files)} files verified")


@app.command()
def promote(
    ref: Ref,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Alias to move, e.g. prod.")],
    root: Root = DEFAULT_ROOT,
    endpoint: MaybeEndpoint = None,
    token_env: TokenEnv = ADMIN_TOKEN,
) -> None:
    """Point an alias at a version, atomically. Running requests finish on the version they started with.

    With --endpoint a running endpoint does it: it loads the version before the alias moves, and follows at once.
    """
    from graftwork.artifacts.publish import promote as move_alias

    if endpoint is not None:
        task, _, version = ref.partition("@")
        _send_admin(endpoint, token_env, "promote", adapter=f"{task}@{alias}", version=version or None)
        return
    store = Store(root)
    manifest = resolve(store, ref)
    before = aliases(store, manifest.task).get(alias, "nothing")
    move_alias(store, manifest.task, alias, manifest.version)
    echo(f"{manifest.task}@{alias}: {before} -> {manifest.version}")


@app.command()
def rollback(
    ref: Ref, root: Root = DEFAULT_ROOT, endpoint: MaybeEndpoint = None, token_env: TokenEnv = ADMIN_TOKEN
) -> None:
    """Point TASK@ALIAS at its previous version. Each repetition goes one version further back."""
    if endpoint is not None:
        _send_admin(endpoint, token_env, "rollback", adapter=ref)
        return
    task, _, alias = ref.partition("@")
    old, new = roll_back(Store(root), task, alias)
    echo(f"{ref}: {old} -> {new}")


@app.command()
def register(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Folder of a published version, under an allowed root of the endpoint.")
    ],
    endpoint: Endpoint,
    alias: Annotated[
        str | None, typer.Option("--alias", metavar="ALIAS", help="Alias to point at the new version.")
    ] = None,
    token_env: TokenEnv = ADMIN_TOKEN,
) -> None:
    """Copy a version from another store into the store of the endpoint. The files are verified first."""
    _send_admin(endpoint, token_env, "register", uri=uri, alias=alias)


@app.command()
def load(ref: Ref, endpoint: Endpoint, token_env: TokenEnv = ADMIN_TOKEN) -> None:
    """Load a version into the memory of the endpoint before the first request for it."""
    _send_admin(endpoint, token_env, "load", adapter=ref)


@app.command()
def pin(ref: Ref, endpoint: Endpoint, token_env: TokenEnv = ADMIN_TOKEN) -> None:
    """Load a version and protect it from eviction."""
    _send_admin(endpoint, token_env, "pin", adapter=ref)


@app.command()
def unpin(ref: Ref, endpoint: Endpoint, token_env: TokenEnv = ADMIN_TOKEN) -> None:
    """Allow a pinned version to be evicted."""
    _send_admin(endpoint, token_env, "unpin", adapter=ref)


@app.command()
def unload(ref: Ref, endpoint: Endpoint, token_env: TokenEnv = ADMIN_TOKEN) -> None:
    """Unload a version once its last request has ended. It stays registered."""
    _send_admin(endpoint, token_env, "unload", adapter=ref)


def swap(
    ref: Annotated[str, typer.Argument(metavar="TASK@ALIAS", help="Alias to move, e.g. support@prod.")],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version or alias to point it at.")],
    endpoint: Endpoint,
    token_env: TokenEnv = ADMIN_TOKEN,
) -> None:
    """Point an alias at another version on a running endpoint, without downtime.

    The version is loaded before the alias moves, so no request waits. Running requests finish on their version.
    """
    _send_admin(endpoint, token_env, "promote", adapter=ref, version=version)


def _send_admin(endpoint: str, token_env: str, verb: str, **body: str | None) -> None:
    from graftwork.serving.client import Client

    with Client(endpoint, os.environ.get(token_env)) as client:
        for done in client.admin(verb, **body):
            echo("  ".join(f"{key}={value}" for key, value in done.items() if value is not None))


def _show_registered(endpoint: str, token_env: str, as_json: bool) -> None:
    from graftwork.serving.client import Client

    with Client(endpoint, os.environ.get(token_env)) as client:
        found = client.registered()
    if as_json:
        print_json(found)
        return
    keys = ("tier", "state", "pinned", "running", "replicas")
    rows = [
        (
            r["task"],
            r["version"],
            ",".join(r["aliases"]) or "-",
            *[("no", "yes")[r[key]] if isinstance(r[key], bool) else r[key] for key in keys],
            gib(r["file_bytes"]),
        )
        for r in found
    ]
    print_table(f"adapters of {endpoint}", ("task", "version", "aliases", *keys, "size"), rows)
    for row in found:
        for alias in row.get("in_store", ()):
            ref, version = f"{row['task']}@{alias}", row["version"]
            echo(f"{ref} means {version} in the store: `graftwork swap {ref} {version} --endpoint {endpoint}`")


@app.command("rm")
def remove(ref: Ref, root: Root = DEFAULT_ROOT) -> None:
    """Delete a version. Fails while an alias points at it."""
    from graftwork.artifacts.publish import remove as remove_version

    store = Store(root)
    task, version = locate(store, ref)  # not opened: a damaged version too can be removed
    remove_version(store, task, version)
    echo(f"removed {task}@{version}")
