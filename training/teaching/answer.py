"""One answer of a teacher."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherAnswer:
    """What was written; `ended` by the teacher itself and not by the limit on its length."""

    text: str
    ended: bool
