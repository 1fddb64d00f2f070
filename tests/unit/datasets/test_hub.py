"""Datasets and bases of a Hugging Face hub: a real HTTP server on this machine, which HF_ENDPOINT names.

The libraries read HF_ENDPOINT and HF_HUB_OFFLINE where they are imported, so each environment has a process of its own.
"""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import Files, Hub, serve_hub
from tests.tiny import write_tiny_base, write_tiny_tokenizer

CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: short
  data_files:
  - {split: train, path: short/train-*}
---
"""
READ = """
import json, os, sys
from graftwork.base.load import prompt_template
from graftwork.base.source import BaseSpec, locate
from graftwork.datasets.readers import read_records
from graftwork.errors import GraftworkError
for kind, uri, token in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    try:
        if kind == "rows":
            found = [record["prompt"] for _, record in read_records(uri)]
        elif kind == "base":
            found = sorted(path.name for path in locate(uri, None, None).iterdir())
        else:
            found = len(prompt_template(BaseSpec(uri=uri)).encode("Where is ZPPP?"))
    except GraftworkError as error:
        found = error.text()
    print("FOUND " + json.dumps(found), flush=True)
"""


def parquet(name: str, count: int) -> bytes:
    rows = [{"prompt": f"{name} {n}", "completion": f"answer {n}"} for n in range(count)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    base = write_tiny_tokenizer(tmp_path_factory.mktemp("base"))
    model = {"config.json": b"{}", "model.safetensors": b"weights"}
    model |= {path.name: path.read_bytes() for path in base.iterdir()}
    parts = {
        "data/train-0.parquet": ("train", 16),
        "data/test-0.parquet": ("test", 2),
        "short/train-0.parquet": ("s", 1),
    }
    rows = {"README.md": CARD, **{path: parquet(*what) for path, what in parts.items()}}
    old = {**rows, "data/train-0.parquet": parquet("old", 3)}
    repositories: dict[str, dict[str, Files]] = {
        "datasets/team/rows": {"main": rows, "v1": old},
        "datasets/team/gated": {"main": rows},
        "models/team/tiny": {"main": model, "v1": model},
        "models/team/gated": {"main": model},
    }
    with serve_hub(Hub(repositories, frozenset({"datasets/team/gated", "models/team/gated"}))) as served:
        yield served


def environment(home: Path, url: str, **more: str) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return {**os.environ, **own, **more}


def read(asked: list[tuple[str, str, str]], env: dict[str, str]) -> list[Any]:
    """What one process reads, an answer or an error for each (kind, URI, token)."""
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, input=json.dumps(asked), env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]


ASKED = {
    ("rows", "hf://team/rows/train", ""): [f"train {n}" for n in range(16)],
    ("rows", "hf://team/rows/test", ""): ["test 0", "test 1"],
    ("rows", "hf://team/rows/short/train", ""): ["s 0"],
    ("rows", "hf://team/rows@v1/train", ""): ["old 0", "old 1", "old 2"],
    ("rows", "hf://team/gated/test", "granted"): ["test 0", "test 1"],
    ("rows", "hf://team/rows/valid", ""): r"Bad split: valid.*train.*test.*Hint: end the URI with one of the splits",
    ("rows", "hf://team/rows/long/train", ""): "'long' not found.*default.*short.*Hint: name a configuration",
    ("rows", "hf://team/rows@v9/train", ""): "Revision 'v9' doesn't exist.*Hint: name a branch",
    ("rows", "hf://team/none/train", ""): "doesn't exist.*Hint: check the id; a private .* HF_TOKEN",
    ("rows", "hf://team/gated/train", ""): "gated dataset.*Hint: ask for access.*HF_TOKEN",
    ("rows", "hf://team/gated/train", "denied"): "gated dataset.*Hint: ask for access",
    ("base", "team/tiny@v9", ""): "base team/tiny@v9: .*no revision 'v9'.*Hint: name a branch",
    ("base", "team/none", ""): "base team/none: .*no such model.*Hint: check the id; a private .* HF_TOKEN",
    ("base", "team/gated", ""): "base team/gated: it is gated.*Hint: ask for access.*HF_TOKEN",
    ("base", "team/gated", "denied"): "base team/gated: it is gated",
    ("base", "hf://team/tiny", ""): "Hint: write the id alone: team/tiny",
    ("template", "team/gated", "granted"): 14,
}


def test_rows_and_bases_of_a_hub_are_read_or_an_error_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    found = read(list(ASKED), environment(tmp_path, hub.url))
    for (kind, uri, token), answer, wanted in zip(ASKED, found, ASKED.values(), strict=True):
        if isinstance(wanted, str):
            assert re.search(f"(?s){wanted}", answer), f"{uri} {token}: {answer}"
            assert uri.partition("@")[0].removeprefix("hf://") in answer
        elif kind == "rows":
            assert answer == wanted, uri
        else:
            assert 0 < answer <= wanted, uri
    assert not [path for path in hub.requests if path.endswith(".safetensors")]  # a template needs no weights


@pytest.mark.long
def test_offline_the_cache_is_used_and_an_error_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    asked = [("base", "team/tiny", ""), ("rows", "hf://team/rows/train", "")]
    [base, _] = read(asked, environment(tmp_path, hub.url))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(base)
    offline = environment(tmp_path, hub.url, HF_HUB_OFFLINE="1")
    [cached, rows, absent] = read([*asked, ("base", "team/gated", "")], offline)
    assert cached == base
    assert re.search("(?s)Offline.*Hint: unset HF_HUB_OFFLINE.*hf:///PATH/SPLIT", rows)
    assert re.search("(?s)base team/gated: .*not in the Hugging Face cache.*Hint: unset HF_HUB_OFFLINE", absent)


@pytest.mark.long
def test_a_hub_that_is_out_of_reach_is_an_error(tmp_path: Path) -> None:
    """The library tries five more times, for 20 s."""
    [rows] = read([("rows", "hf://team/rows/train", "")], environment(tmp_path, "http://127.0.0.1:9"))
    assert re.search(
        "(?s)hf://team/rows/train: it cannot be read.*Hint: check the network, its proxy and HF_ENDPOINT", rows
    )


@pytest.mark.long
def test_a_run_trains_on_rows_and_a_base_of_a_hub(hub: Hub, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    hub.repositories["models/team/colours"] = {"main": {path.name: path.read_bytes() for path in base.iterdir()}}
    spec = tmp_path / "train.yaml"
    spec.write_text(
        "{kind: train, name: colours, base: team/colours, num_workers: 1, max_length: 64, quant: {kind: none}, "
        "optim: {epochs: 1, rows_per_step: 8, micro_batch: 4}, adapter: {rank: 2}, "
        f"root: {tmp_path / 'store'}, data: {{train: 'hf://team/rows@v1/train', eval: 'hf://team/rows/test'}}}}"
    )
    env = environment(tmp_path, hub.url, GRAFTWORK_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-c", "import sys; from graftwork.cli import main; sys.exit(main())"]
    shown = subprocess.run(
        [*command, "data", "show", "--spec", str(spec), "--json"], env=env, capture_output=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert (report["format"], report["count"], report["eval"]["rows"]) == ("trl", 3, 2)
    assert report["rows"][0]["tokens"]
    done = subprocess.run([*command, "train", str(spec)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "store" / "adapters" / "colours").iterdir())
