"""Sweeps: search, early stopping, trials on Ray Tune, finals and the winner."""

from pathlib import Path

# A checkout reaches this folder by a link in graftwork/. Breakpoints, coverage and tracebacks need its real path.
__path__[:] = [str(Path(__path__[0]).resolve())]
