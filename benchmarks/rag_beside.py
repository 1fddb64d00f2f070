"""The peers of the retrieval benchmark: installed apart from the project, run in processes of their own."""

import json
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.rag_data import Corpus
from graftwork.metrics import quantile
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root

PEERS = ("bm25s", "tantivy")
PEER_PACKAGES = ("bm25s==0.3.16", "PyStemmer==3.1.0", "tantivy==0.27.0")
FOUND = 5
"""Hits asked for."""


class Peers:
    """bm25s and tantivy behind an interpreter of their own; None where pip can't have them."""

    def __init__(self) -> None:
        self.python: Path | None = None
        try:
            folder = build_once(cache_root() / "peers" / "-".join(PEER_PACKAGES), _install)
            self.python = Path((folder / "python").read_text())
        except (subprocess.SubprocessError, OSError) as error:
            print(f"NOT MEASURED: {', '.join(PEERS)}: pip cannot install them here ({error})", flush=True)

    def ask(self, name: str, corpus: Corpus, rounds: int) -> dict[str, Any] | None:
        """Its index cost, query percentiles and hits of the last round, each round a new process."""
        if self.python is None:
            return None
        spent, times, top = [], [], []
        with TemporaryDirectory(prefix="graftwork-peers-") as folder:
            source, target = Path(folder) / "in.json", Path(folder) / "out.json"
            texts = [passage.text for passage in corpus.passages]
            source.write_text(json.dumps({"texts": texts, "queries": list(corpus.queries), "k": FOUND}))
            for _ in range(rounds):
                script = Path(__file__).with_name("rag_peers.py")
                subprocess.run([self.python, script, name, source, target], check=True, timeout=600)
                told = json.loads(target.read_text())
                spent.append(told["index_cpu_s"])
                times.append(told["query_ms"])
                top = told["top"]
        print(f"{name} {corpus.name}: {min(spent):.2f} CPU-s", flush=True)
        return {"index_cpu_s": spent, **percentiles(times), "top": top}


def _install(folder: Path) -> None:
    """Beside the folder, which tells where: a virtual environment can't be moved."""
    home = folder.parent / f"venv-{folder.name.removeprefix('.tmp-')}"
    venv.create(home, with_pip=True, clear=True)
    subprocess.run([home / "bin" / "python", "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True, timeout=600)
    (folder / "python").write_text(str(home / "bin" / "python"))


def percentiles(times: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """p50 and p99 of each round."""
    return {f"query_p{q}_ms": [quantile(one, q / 100) for one in times] for q in (50, 99)}
