"""Whether an attempt still is the one: a later attempt, or a later start of the same one, takes its place for good."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Self

from graftwork.storage import Store

ENVIRONMENT = "GRAFTWORK_ATTEMPT"
"""Tells the command that a driver runs whose attempt it is."""


@dataclass(frozen=True)
class Fence:
    """Cheap to build, to pickle and to send to workers."""

    root: str
    job_id: str
    attempt: int
    start: int

    @classmethod
    def of_environment(cls) -> Self | None:
        """The attempt that this process works for; None outside of a job."""
        told = os.environ.get(ENVIRONMENT)
        return cls(**json.loads(told)) if told else None

    @property
    def folder(self) -> tuple[str, ...]:
        """Key of the attempt's folder."""
        return ("jobs", self.job_id, f"a{self.attempt}")

    def dump(self) -> str:
        """As it travels in the environment."""
        return json.dumps(asdict(self))

    def overtaken(self) -> bool:
        """Whether another one was started since: then nothing may be committed any more."""
        store = Store(self.root)
        later_attempt = ("jobs", self.job_id, "attempts", f"{self.attempt + 1}.json")
        return store.exists(*later_attempt) or store.exists(*self.folder, "starts", f"{self.start + 1}.json")
