"""Targets that run work: a private Ray, a Ray at an address, KubeRay; jobs, their records and drivers."""

from pathlib import Path

# A checkout reaches this folder by a link in graftwork/. Breakpoints, coverage and tracebacks need its real path.
__path__[:] = [str(Path(__path__[0]).resolve())]
