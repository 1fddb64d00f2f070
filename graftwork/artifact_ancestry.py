"""Where an adapter came from: what it was trained on from, merged out of, and the base below, as far as it is known."""

from typing import Any

from graftwork import base_publish
from graftwork.artifact_manifest import AdapterManifest
from graftwork.artifact_read import UnknownAdapter, resolve
from graftwork.storage import Store


def parents(manifest: AdapterManifest) -> tuple[str, ...]:
    """`task@version` of each adapter that this one was made from."""
    if manifest.parent is None:
        return manifest.merged_from
    own = manifest.parent if "@" in manifest.parent else f"{manifest.task}@{manifest.parent}"
    return (own, *manifest.merged_from)


def tree(store: Store, manifest: AdapterManifest) -> dict[str, Any]:
    """The version, how it was made, and the same of each that it was made from; JSON-ready.

    One that was removed since is named and marked. Versions are digests of their content, so no circle can be.
    """
    return {
        "ref": manifest.ref,
        "made": _made(manifest),
        "run": manifest.run,
        "from": [_of(store, ref) for ref in parents(manifest)],
    }


def base(store: Store, digest: str) -> dict[str, Any]:
    """The base below: its digest, and where it was trained here its place, its run and its own base."""
    for name in store.list("bases"):
        for version in store.list("bases", name):
            found = base_publish.find(store, name, version) if digest.startswith(version) else None
            if found is not None:
                place = base_publish.place(store, name, version)
                return {
                    "digest": digest,
                    "place": place,
                    "run": found.run,
                    "from": base(store, found.parent_digest) | {"uri": found.parent_uri},
                }
    return {"digest": digest}


def _of(store: Store, ref: str) -> dict[str, Any]:
    try:
        return tree(store, resolve(store, ref))
    except UnknownAdapter:
        return {"ref": ref, "made": "removed since"}


def _made(manifest: AdapterManifest) -> str:
    merge = manifest.method.get("merge")
    if isinstance(merge, dict):
        weights = merge["weights"]
        assert isinstance(weights, list), "a merge records its weights"
        return f"merged by {merge['method']}, weights {', '.join(map(str, weights))}"
    how = f"trained: {manifest.method.get('objective', 'sft')}, {manifest.method.get('kind', 'lora')}"
    below = manifest.method.get("stacked_on")
    return how + (", going on" if manifest.parent else "") + (f", on top of {below}" if below else "")
