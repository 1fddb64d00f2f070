"""Serving: the multi-adapter engine, the HTTP endpoint, evaluation, A/B tests and RAG."""

from pathlib import Path

# A checkout reaches this folder by a link in graftwork/. Breakpoints, coverage and tracebacks need its real path.
__path__[:] = [str(Path(__path__[0]).resolve())]
