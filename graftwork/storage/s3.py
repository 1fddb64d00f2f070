"""Objects on S3 or on a server that speaks its protocol, through s3fs. Credentials come from the environment alone."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from graftwork.errors import StorageError, StoreUnreachable
from graftwork.storage.local import FULL_DISK, tmp_name

CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 20
MAX_ATTEMPTS = 3
"""Of one request, by botocore; s3fs asks a second time for a body that broke off and where a server says SlowDown."""

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


class S3Objects:
    """Objects by `s3://` URI; every failure is a StorageError. The client is built at the first call."""

    def __init__(self) -> None:
        self._fs: Any = None

    def read(self, uri: str) -> bytes | None:
        with _as_storage_errors("read", uri):
            try:
                data: bytes = self._client().cat_file(uri)
            except FileNotFoundError as error:
                if _is_bucket_missing(error):
                    raise
                return None
            return data

    def write(self, uri: str, data: bytes) -> None:
        """One PUT; from 100 MiB on a multipart upload, which too is invisible until it is complete."""
        with _as_storage_errors("write", uri):
            self._client().pipe_file(uri, data)

    def create(self, uri: str, data: bytes) -> bool:
        """PUT with `If-None-Match: *`, which one writer wins."""
        with _as_storage_errors("create", uri):
            try:
                self._client().pipe_file(uri, data, mode="create")
            except OSError as error:
                if _code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                    return False
                raise
        return True

    def append(self, uri: str, line: bytes) -> None:
        raise StorageError(
            f"append {len(line)} bytes to {uri}",
            "objects on S3 cannot grow",
            "a log is appended to on a disk",
            "write the log locally and upload it whole",
        )

    def exists(self, uri: str) -> bool:
        bucket, key = _bucket_key(uri)
        with _as_storage_errors("look for", uri):
            try:
                self._client().call_s3("head_object", Bucket=bucket, Key=key)
            except FileNotFoundError:
                page = self._client().call_s3("list_objects_v2", Bucket=bucket, Prefix=key + "/", MaxKeys=1)
                return bool(page.get("Contents"))
        return True

    def children(self, uri: str) -> dict[str, int | None]:
        bucket, key = _bucket_key(uri)
        prefix = key + "/" if key else ""
        found: dict[str, int | None] = {}
        with _as_storage_errors("list", uri):
            for page in self._pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
                for folder in page.get("CommonPrefixes", ()):
                    found[folder["Prefix"][len(prefix) :].rstrip("/")] = None
                for item in page.get("Contents", ()):
                    found[item["Key"][len(prefix) :]] = item["Size"]
        found.pop("", None)  # a marker object that some consoles write for an empty folder
        return found

    def stamps(self, uri: str) -> dict[str, str]:
        bucket, key = _bucket_key(uri)
        with _as_storage_errors("list", uri):
            pages = list(self._pages(Bucket=bucket, Prefix=key + "/", Delimiter="/"))
        return {i["Key"][len(key) + 1 :]: i["ETag"] for page in pages for i in page.get("Contents", ())}

    def tree(self, uri: str) -> dict[tuple[str, ...], str]:
        bucket, key = _bucket_key(uri)
        with _as_storage_errors("list", uri):
            pages = list(self._pages(Bucket=bucket, Prefix=key + "/"))
        return {
            tuple(i["Key"][len(key) + 1 :].split("/")): i["ETag"] for page in pages for i in page.get("Contents", ())
        }

    def ages(self, uri: str) -> dict[tuple[str, ...], float]:
        """Its clock is the `Date` of its answer, in whole seconds, as `LastModified` is."""
        bucket, key = _bucket_key(uri)
        found: dict[tuple[str, ...], float] = {}
        with _as_storage_errors("list", uri):
            for page in self._pages(Bucket=bucket, Prefix=key + "/"):
                now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
                for item in page.get("Contents", ()):
                    age = (now - item["LastModified"]).total_seconds()
                    found[tuple(item["Key"][len(key) + 1 :].split("/"))] = max(age, 0.0)
        return found

    def delete(self, uri: str) -> None:
        bucket, key = _bucket_key(uri)
        with _as_storage_errors("delete", uri):
            self._client().call_s3("delete_object", Bucket=bucket, Key=key)
            keys = [
                item["Key"]
                for page in self._pages(Bucket=bucket, Prefix=key + "/")
                for item in page.get("Contents", ())
            ]
            for start in range(0, len(keys), _PAGE):
                batch = {"Objects": [{"Key": key} for key in keys[start : start + _PAGE]], "Quiet": True}
                failed = self._client().call_s3("delete_objects", Bucket=bucket, Delete=batch).get("Errors")
                if failed:
                    raise OSError(f"{failed[0].get('Code')} for {failed[0].get('Key')}, {len(failed)} objects in all")

    def put_file(self, local: Path, uri: str) -> None:
        with _as_storage_errors("upload to", uri):
            self._client().put_file(str(local), uri)

    def get_file(self, uri: str, local: Path) -> None:
        tmp = local.parent / tmp_name()
        with _as_storage_errors("download", uri):
            local.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._client().get_file(uri, str(tmp))
                os.replace(tmp, local)
            finally:
                tmp.unlink(missing_ok=True)

    def _pages(self, **request: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._client().call_s3("list_objects_v2", **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _client(self) -> Any:
        if self._fs is None:
            _require_plain_endpoint()
            _require_credentials()
            import s3fs

            retries = {"total_max_attempts": MAX_ATTEMPTS, "mode": "standard"}
            self._fs = s3fs.S3FileSystem(
                skip_instance_cache=True,  # a cached client would keep credentials that the environment has changed
                use_listings_cache=False,
                config_kwargs={
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "read_timeout": READ_TIMEOUT_S,
                    "retries": retries,
                },
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


def _require_plain_endpoint() -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if "@" in os.environ.get(name, ""):
            raise StorageError(
                name,
                "it carries credentials (hidden here)",
                "an endpoint names a server and nothing else",
                "take them out; they go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _require_credentials() -> None:
    """Without this, botocore would ask the instance metadata address for credentials, for seconds."""
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
    from botocore.exceptions import BotoCoreError, ClientError
    from s3fs.core import S3_RETRYABLE_ERRORS

    try:
        yield
    except (OSError, BotoCoreError, ClientError, *S3_RETRYABLE_ERRORS) as error:
        found, hint = _explain(error, uri)
        kind = StoreUnreachable if _may_pass(error) else StorageError
        raise kind(f"{action} {uri} at {endpoint()}", _scrub(found), "", hint) from error


def _may_pass(error: BaseException) -> bool:
    """An outage: no answer, half an answer, or the server's word that it cannot serve now."""
    from botocore import exceptions as boto
    from s3fs.core import S3_RETRYABLE_ERRORS

    answers = (boto.ConnectionError, boto.HTTPClientError, ConnectionError, TimeoutError, *S3_RETRYABLE_ERRORS)
    return isinstance(error, answers) or _code(error) in _PASSING


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
