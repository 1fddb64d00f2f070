"""Every error a person can meet, and the exit code it ends the command with.

    GraftworkError
    ├── UserError        exit 2: the input is wrong; nothing was started
    │   ├── ConfigError      a spec, a flag, a `--set`
    │   │   └── PreflightError   a job that its place would not run, with every finding
    │   ├── DataError        a dataset, a row, a corpus
    │   ├── BaseModelError   a base model that cannot be resolved, verified or loaded
    │   ├── ArtifactError    an adapter that is missing, corrupt, unsafe, or made for another base
    │   └── StorageError     a URI, credentials, a full disk
    │       └── StoreUnreachable    a server that does not answer now
    ├── RunError         exit 1: the work itself failed
    │   └── Interrupted      Ctrl-C or SIGTERM; what was committed stays valid
    └── ClusterError     exit 3: no cluster could be had

A message has four parts: the subject (key and value), the problem, the rule and the hint.
"""

from collections.abc import Mapping, Sequence


class GraftworkError(Exception):
    """Base of all errors meant for people. `exit_code` ends the command."""

    exit_code = 1

    def __init__(
        self, subject: str, problem: str = "", rule: str = "", hint: str = "", also: Sequence[str] = ()
    ) -> None:
        """`also`: further problems of the same input, one line each."""
        self.subject, self.problem, self.rule, self.hint, self.also = subject, problem, rule, hint, tuple(also)
        super().__init__(self.text())

    def text(self) -> str:
        """Return the message as shown: subject and problem, then the rule, then the hint."""
        lines = [f"{type(self).__name__}: {self.subject}" + (f": {self.problem}" if self.problem else "")]
        lines += [f"  Rule: {self.rule}"] if self.rule else []
        lines += [f"  Hint: {self.hint}"] if self.hint else []
        lines += [f"  Also: {line}" for line in self.also]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def __reduce__(self) -> tuple[type["GraftworkError"], tuple[str, str, str, str, tuple[str, ...]]]:
        return type(self), (self.subject, self.problem, self.rule, self.hint, self.also)  # Ray pickles it


class UserError(GraftworkError):
    """The input is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UserError):
    """A spec, a flag or a `--set` that cannot take effect."""


class PreflightError(ConfigError):
    """A job that its place would not run. `findings` has them all, each with its code."""

    def __init__(self, subject: str, findings: Sequence[Mapping[str, str]]) -> None:
        self.findings = tuple(findings)
        lines = [
            f"{f['code']} {f['where']}: {f['problem']}" + (f" ({f['rule']})" if f["rule"] else "") for f in findings
        ]
        moves = dict.fromkeys(f["hint"] for f in findings if f["hint"])
        super().__init__(
            subject,
            "\n    ".join([f"{len(lines)} findings", *lines]),
            "nothing was written or started",
            "; ".join(moves),
        )

    def __reduce__(self) -> tuple[type["PreflightError"], tuple[str, tuple[Mapping[str, str], ...]]]:  # type: ignore[override]
        return type(self), (self.subject, self.findings)


class DataError(UserError):
    """A dataset, a row or a corpus that cannot be used. Rows are named by 1-based number."""


class BaseModelError(UserError):
    """A base model that cannot be resolved, verified or loaded."""


class ArtifactError(UserError):
    """An adapter that is missing, corrupt, unsafe, or made for another base."""


class StorageError(UserError):
    """A URI, credentials or a full disk."""


class StoreUnreachable(StorageError):
    """A server that does not answer now: the same call may succeed later."""


class RunError(GraftworkError):
    """The work itself failed after it had started."""


class Interrupted(RunError):
    """Ctrl-C or SIGTERM. What was committed stays valid; the same command continues."""


class ClusterError(GraftworkError):
    """No cluster could be had."""

    exit_code = 3
