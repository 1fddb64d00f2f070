"""Whether a store takes what a job does to it: write, read, put on a condition, delete. Before all else is written."""

import secrets

from graftwork.cluster.backend import Finding
from graftwork.errors import StorageError, StoreUnreachable
from graftwork.storage import Store, json_bytes

WHERE = "root"


def probe_store(root: str) -> list[Finding]:
    """What is wrong with a store on S3, by a small object that is removed again. Folders are the places' to look at."""
    store = Store(root)
    if store.is_local:
        return []
    key, first = f"probe-{secrets.token_hex(8)}.json", json_bytes({"probe": 1})
    try:
        if not store.create_bytes(first, key) or store.create_bytes(json_bytes({"probe": 2}), key):
            return [_unconditional(store, "a second put of one key with If-None-Match: * was taken")]
        read = store.find_bytes(key)
        if read != first:
            return [_finding("E-STORE-READS-ANOTHER", store, "what was written is not what is read",
                             "a job's record is read as it was written", "look at what caches it")]  # fmt: skip
        return []
    except StorageError as error:
        return [_failed(store, error)]
    finally:
        _remove(store, key)


def _failed(store: Store, error: StorageError) -> Finding:
    if isinstance(error, StoreUnreachable):
        return _finding("E-STORE-UNREACHABLE", store, error.problem, "all of a job reach its store", error.hint)
    if isinstance(error.__cause__, PermissionError):
        return _finding("E-STORE-DENIED", store, f"{error.subject}: {error.problem}",
                        "a job reads, writes, lists and deletes below its root", error.hint)  # fmt: skip
    if "NotImplemented" in error.problem:
        return _unconditional(store, "it knows no put with If-None-Match: *")
    return _finding("E-STORE-FAILS", store, f"{error.subject}: {error.problem}", error.rule, error.hint)


def _unconditional(store: Store, found: str) -> Finding:
    return _finding(
        "E-STORE-NO-CONDITIONAL-PUT", store, found,
        "of all who start an attempt one must win", "use a server that knows conditional puts, as S3 does since 2024",
    )  # fmt: skip


def _finding(code: str, store: Store, found: str, rule: str, hint: str) -> Finding:
    return Finding(code, "error", f"{WHERE} {store.uri}", found, rule, hint)


def _remove(store: Store, key: str) -> None:
    try:
        store.delete(key)
    except StorageError:
        return  # what keeps it from being removed was found, or is found by whoever clears the store
