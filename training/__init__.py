"""One training run, from its spec to a published adapter version or base."""

from pathlib import Path

# A checkout reaches this folder by a link in graftwork/. Breakpoints, coverage and tracebacks need its real path.
__path__[:] = [str(Path(__path__[0]).resolve())]
