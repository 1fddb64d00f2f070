"""Module patterns of an adapter's config: regular expressions that come with a file and are run on our side."""

import re

_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_UNBOUNDED = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
MAX_LENGTH, MAX_UNBOUNDED = 1024, 3


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern is not run: it doesn't compile, or it could take long to fail on a name; None where it may be.

    A repeated group can take exponential time; each further `*` or `+` multiplies the time by the name's length.
    """
    if len(pattern) > MAX_LENGTH:
        return f"{len(pattern)} characters, at most {MAX_LENGTH} are read"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression: {error}"
    if _REPEATED_GROUP.search(pattern):
        return "a group is repeated, which can take exponential time"
    if len(_UNBOUNDED.findall(pattern)) > MAX_UNBOUNDED:
        return f"more than {MAX_UNBOUNDED} unbounded repetitions"
    return None
