"""A program of one's own as a job: to prepare data, to evaluate, to convert, beside the stages that Graftwork knows."""

from typing import Annotated, Literal

from pydantic import Field

from graftwork.config import Spec
from graftwork.storage import DEFAULT_ROOT, NAME_PATTERN


class ExecSpec(Spec):
    """Runs `argv` where the work is, with a job's log, limits and fence. Its environment names the job (fence.py)."""

    kind: Literal["exec"] = "exec"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    argv: tuple[str, ...] = Field(min_length=1)
    """Program and arguments, one string each. No shell reads them."""
