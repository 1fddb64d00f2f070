"""Objects on S3 or on a server that speaks its protocol, through s3fs. Credentials come from the environment alone."""

import functools
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

from graftwork.errors import StorageError, StoreUnreachable
from graftwork.storage.local import FULL_DISK, tmp_name

CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 20
MAX_ATTEMPTS = 3
"""Of one request, by botocore; s3fs asks a second time for a body that broke off and where a server says SlowDown."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Between two tries of a call while the server cannot be reached."""

_CREDENTIAL_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_UNMISTAKABLE = 16
"""Characters from which a secret is no part of another word; AWS's have 40."""
_PAGE = 1000


T = TypeVar("T")
P = ParamSpec("P")
Request = Callable[Concatenate["S3Objects", str, P], T]


def _request(action: str) -> Callable[[Request[P, T]], Request[P, T]]:
    """Turn a method's failures into StorageErrors, and call it again while the server cannot be reached."""

    def decorate(method: Request[P, T]) -> Request[P, T]:
        @functools.wraps(method)
        def call(self: "S3Objects", uri: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
            end, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
            while True:
                try:
                    with _as_storage_errors(action, uri):
                        return method(self, uri, *args, **kwargs)
                except StoreUnreachable:
                    if time.monotonic() + pause_s > end:
                        raise
                time.sleep(pause_s * random.uniform(0.5, 1.0))  # workers that failed together come back apart
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

        return call

    return decorate


class S3Objects:
    """Objects by `s3://` URI; every failure is a StorageError. The client is built at the first call.

    Each call but `append` is tried again for `patience_s` seconds while the server cannot be reached.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self.patience_s = patience_s
        self._fs: Any = None

    @_request("read")
    def read(self, uri: str) -> bytes | None:
        try:
            data: bytes = self._client().cat_file(uri)
        except FileNotFoundError as error:
            if _is_bucket_missing(error):
                raise
            return None
        return data

    @_request("write")
    def write(self, uri: str, data: bytes) -> None:
        """One PUT; from 100 MiB on a multipart upload, which too is invisible until it is complete."""
        self._client().pipe_file(uri, data)

    def create(self, uri: str, data: bytes) -> bool:
        """PUT with `If-None-Match: *`, which one writer wins."""
        return self._create(uri, data, itertools.count())

    @_request("create")
    def _create(self, uri: str, data: bytes, tries: Iterator[int]) -> bool:
        is_again = next(tries) > 0
        try:
            self._client().pipe_file(uri, data, mode="create")
        except OSError as error:
            if _code(error) not in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                raise
            # an answer lost on its way leaves our own bytes there: then we are the one who created it
            return is_again and self.read(uri) == data
        return True

    def append(self, uri: str, line: bytes) -> None:
        raise StorageError(
            f"append {len(line)} bytes to {uri}",
            "objects on S3 cannot grow",
            "a log is appended to on a disk",
            "write the log locally and upload it whole",
        )

    @_request("look for")
    def exists(self, uri: str) -> bool:
        bucket, key = _bucket_key(uri)
        try:
            self._client().call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            page = self._client().call_s3("list_objects_v2", Bucket=bucket, Prefix=key + "/", MaxKeys=1)
            return bool(page.get("Contents"))
        return True

    @_request("list")
    def children(self, uri: str) -> dict[str, int | None]:
        bucket, key = _bucket_key(uri)
        prefix = key + "/" if key else ""
        found: dict[str, int | None] = {}
        for page in self._pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for folder in page.get("CommonPrefixes", ()):
                found[folder["Prefix"][len(prefix) :].rstrip("/")] = None
            for item in page.get("Contents", ()):
                found[item["Key"][len(prefix) :]] = item["Size"]
        found.pop("", None)  # a marker object that some consoles write for an empty folder
        return found

    @_request("list")
    def stamps(self, uri: str) -> dict[str, str]:
        return {name: item["ETag"] for _, name, item in self._objects(uri, Delimiter="/")}

    @_request("list")
    def tree(self, uri: str) -> dict[tuple[str, ...], str]:
        return {tuple(name.split("/")): item["ETag"] for _, name, item in self._objects(uri)}

    @_request("list")
    def ages(self, uri: str) -> dict[tuple[str, ...], float]:
        """Its clock is the `Date` of its answer, in whole seconds, as `LastModified` is."""
        found: dict[tuple[str, ...], float] = {}
        for page, name, item in self._objects(uri):
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            found[tuple(name.split("/"))] = max((now - item["LastModified"]).total_seconds(), 0.0)
        return found

    @_request("delete")
    def delete(self, uri: str) -> None:
        bucket, key = _bucket_key(uri)
        self._client().call_s3("delete_object", Bucket=bucket, Key=key)
        keys = [item["Key"] for _, _, item in self._objects(uri)]
        for start in range(0, len(keys), _PAGE):
            batch = {"Objects": [{"Key": key} for key in keys[start : start + _PAGE]], "Quiet": True}
            failed = self._client().call_s3("delete_objects", Bucket=bucket, Delete=batch).get("Errors")
            if failed:
                raise OSError(f"{failed[0].get('Code')} for {failed[0].get('Key')}, {len(failed)} objects in all")

    @_request("upload to")
    def put_file(self, uri: str, local: Path) -> None:
        self._client().put_file(str(local), uri)

    @_request("download")
    def get_file(self, uri: str, local: Path) -> None:
        tmp = local.parent / tmp_name()
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._client().get_file(uri, str(tmp))
            os.replace(tmp, local)
        finally:
            tmp.unlink(missing_ok=True)

    def _objects(self, uri: str, **more: str) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
        """(page of the listing, name below `uri`, entry) of each object below."""
        bucket, key = _bucket_key(uri)
        for page in self._pages(Bucket=bucket, Prefix=key + "/", **more):
            for item in page.get("Contents", ()):
                yield page, item["Key"][len(key) + 1 :], item

    def _pages(self, **request: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._client().call_s3("list_objects_v2", **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _client(self) -> Any:
        if self._fs is None:
            _check_environment()
            import s3fs

            config = {
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"total_max_attempts": MAX_ATTEMPTS, "mode": "standard"},
            }
            self._fs = s3fs.S3FileSystem(
                skip_instance_cache=True,  # a cached client would keep credentials that the environment has changed
                use_listings_cache=False,
                config_kwargs=config,
            )
            self._fs.retries = 2
        return self._fs


def endpoint() -> str:
    """Where requests go, without user and password, for messages and cache keys."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return "AWS"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _check_environment() -> None:
    """Raise StorageError for an endpoint that carries credentials, and where the environment has none.

    Without the latter, botocore would ask the instance metadata address for credentials, for seconds.
    """
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if "@" in os.environ.get(name, ""):
            raise StorageError(
                name,
                "it carries credentials (hidden here)",
                "an endpoint names a server and nothing else",
                "take them out; they go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
    asks_instance = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "false"
    if not asks_instance and not any(os.environ.get(name) for name in _CREDENTIAL_SOURCES):
        raise StorageError(
            "S3 credentials",
            "none in the environment",
            "s3:// reads credentials from the environment only",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_ENDPOINT_URL for a server of your own), or "
            "AWS_PROFILE; on a machine with an instance role set AWS_EC2_METADATA_DISABLED=false",
        )


@contextmanager
def _as_storage_errors(action: str, uri: str) -> Iterator[None]:
    from botocore import exceptions as boto
    from s3fs.core import S3_RETRYABLE_ERRORS

    try:
        yield
    except (OSError, boto.BotoCoreError, boto.ClientError, *S3_RETRYABLE_ERRORS) as error:
        found, hint = _explain(error, uri)
        # an outage: no answer, half an answer, or the server's word that it cannot serve now
        silent = (boto.ConnectionError, boto.HTTPClientError, ConnectionError, TimeoutError, *S3_RETRYABLE_ERRORS)
        kind = StoreUnreachable if isinstance(error, silent) or _code(error) in _PASSING else StorageError
        raise kind(f"{action} {uri} at {endpoint()}", _scrub(found), "", hint) from error


_PASSING = ("InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "500", "502", "503", "504")


def _explain(error: BaseException, uri: str) -> tuple[str, str]:
    from botocore import exceptions as boto

    code, bucket = _code(error), _bucket_key(uri)[0]
    keys = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    if _is_bucket_missing(error):
        return f"there is no bucket {bucket!r}", f"create it (aws s3 mb s3://{bucket}), or set another root:"
    if isinstance(error, FileNotFoundError):
        return "it does not exist", "check the URI"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return f"credentials are incomplete ({type(error).__name__})", keys
    if isinstance(error, PermissionError):
        return f"the server refuses these credentials ({code or 'access denied'})", (
            f"{keys}, and that they may read, write and list bucket {bucket!r}"
        )
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError | TimeoutError):
        return f"the server cannot be reached ({type(error).__name__})", (
            "check that it runs, and AWS_ENDPOINT_URL"
            if endpoint() != "AWS"
            else "check the network; set AWS_ENDPOINT_URL for a server of your own"
        )
    if isinstance(error, OSError) and not code and error.errno in FULL_DISK:
        return f"no space on this machine ({error.strerror})", "free space, or set GRAFTWORK_CACHE to another disk"
    return f"{code or type(error).__name__}: {error}", "check the server's log and the root:"


def _is_bucket_missing(error: BaseException) -> bool:
    return _code(error) == "NoSuchBucket" or "bucket does not exist" in str(error)


def _code(error: BaseException | None) -> str:
    """The S3 error code of an exception or of its cause, '' where there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _scrub(text: str) -> str:
    """Mask credentials. A short one is masked as a whole word alone: the secret `minio` leaves `minio.example`."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _UNMISTAKABLE:
            text = text.replace(value, "***")
        elif value:
            text = re.sub(rf"(?<![\w./-]){re.escape(value)}(?![\w/-]|\.\w)", "***", text)
    return text
