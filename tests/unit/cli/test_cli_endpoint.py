"""The admin verbs of the command line, against an endpoint over real HTTP."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cli import app
from graftwork.prompts.render import Message
from graftwork.serving.api.errors import ApiError
from graftwork.serving.client import ChatCall, Client
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Store, list[str]]]:
    """An endpoint's address, its store, and two versions of `card`, the first of which is `prod`."""
    tmp = tmp_path_factory.mktemp("cli")
    base, store = write_tiny_base(tmp / "base"), Store(str(tmp / "root"))
    known = facts(base_digest=base_model.resolve(BaseSpec(uri=str(base))).digest, prompt={})
    versions = []
    for seed, alias in ((0, "prod"), (1, None)):
        folder = write_lora(base, tmp / str(seed), seed, r=2, target_modules=["q_proj"])
        versions.append(artifact.publish(store, "card", folder, **known, alias=alias).version)
    spec = {"base": str(base), "root": store.uri, "quant": {"kind": "none"}, "engine": {"max_seq_len": 64}}
    with local_endpoint(ServeSpec.model_validate(spec)) as url:
        yield url, store, versions


def run(url: str, *words: str) -> str:
    """What the command prints, on one line."""
    done = CliRunner().invoke(app, [*words, "--endpoint", url], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def state(url: str, version: str) -> dict[str, object]:
    listed = CliRunner().invoke(app, ["adapters", "ls", "--endpoint", url, "--json"], catch_exceptions=False)
    found: dict[str, object] = next(row for row in json.loads(listed.output) if row["version"] == version)
    return found


def test_an_alias_is_swapped_and_rolled_back(parts: tuple[str, Store, list[str]]) -> None:
    url, store, (first, second) = parts
    assert f"old={first} new={second}" in run(url, "swap", "card@prod", second)
    assert aliases(store, "card") == {"prod": second}
    assert state(url, second)["state"] == "ready"
    assert f"old={second} new={first}" in run(url, "adapters", "rollback", "card@prod")
    assert aliases(store, "card") == {"prod": first}
    assert f"new={second}" in run(url, "adapters", "promote", f"card@{second}", "prod")
    run(url, "adapters", "rollback", "card@prod")


def test_a_version_is_loaded_pinned_and_unloaded(parts: tuple[str, Store, list[str]]) -> None:
    url, _, (_, second) = parts
    ref = f"card@{second}"
    assert f"version={second}" in run(url, "adapters", "load", ref)
    assert (state(url, second)["tier"], state(url, second)["pinned"]) == ("host", False)
    run(url, "adapters", "pin", ref)
    assert state(url, second)["pinned"] is True
    run(url, "adapters", "unpin", ref)
    run(url, "adapters", "unload", ref)
    assert (state(url, second)["tier"], state(url, second)["state"]) == ("disk", "registered")


def test_what_the_endpoint_refuses_is_said(parts: tuple[str, Store, list[str]]) -> None:
    url, _, _ = parts
    for words, status in ((("swap", "card@prod", "0" * 12), 404), (("adapters", "register", "/etc/passwd"), 400)):
        with pytest.raises(ApiError) as refused:
            run(url, *words)
        assert refused.value.status == status


def test_a_chat_shows_the_first_of_several_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the address, and by the spec of the endpoint that runs there."""
    spec = {"kind": "serve", "base": str(tmp_path / "base"), "quant": {"kind": "none"}, "engine": {"max_seq_len": 64}}
    write_tiny_base(tmp_path / "base")
    monkeypatch.setenv("CHAT_KEYS", "someone:secret\nother:wrong")
    with local_endpoint(ServeSpec.model_validate(spec), token="secret") as url:
        file = tmp_path / "serve.yaml"
        file.write_text(json.dumps({**spec, "port": int(url.rpartition(":")[2]), "token_env": "CHAT_KEYS"}))
        for words in ((url, "--token-env", "CHAT_KEYS"), (str(file),)):
            done = CliRunner().invoke(app, ["chat", *words, "--message", "Hello"], catch_exceptions=False)
            assert (done.exit_code, "starting one" in done.output) == (0, False), done.output
        with pytest.raises(ApiError, match="API key"):
            CliRunner().invoke(app, ["chat", url, "--message", "Hello"], catch_exceptions=False)


def test_a_list_tells_what_is_served_and_what_the_store_has_moved_on_to(parts: tuple[str, Store, list[str]]) -> None:
    url, store, (first, second) = parts
    run(url, "swap", "card@prod", first)
    artifact.promote(store, "card", "prod", second)  # behind the endpoint's back
    assert (state(url, first)["aliases"], state(url, first)["in_store"]) == (["prod"], [])
    assert (state(url, second)["aliases"], state(url, second)["in_store"]) == ([], ["prod"])
    with Client(url) as client:
        cards = {card["id"]: card["graftwork"].get("adapter_version") for card in client.models()}
    assert cards["base:card@prod"] == first
    listed = run(url, "adapters", "ls")
    assert f"card@prod means {second} in the store: `graftwork swap card@prod {second} --endpoint {url}`" in listed
    run(url, "swap", "card@prod", second)
    assert (state(url, second)["aliases"], state(url, second)["in_store"]) == (["prod"], [])
    run(url, "swap", "card@prod", first)


def test_a_folder_of_pefts_is_published_and_answers(parts: tuple[str, Store, list[str]], tmp_path: Path) -> None:
    url, store, _ = parts
    base = Path(store.uri).parent / "base"
    folder = write_lora(base, tmp_path / "peft", 5, r=4, target_modules=["q_proj"])
    words = ["adapters", "publish", str(folder), "elsewhere", "--base", str(base), "--root", store.uri]
    made = {}
    for extra in ([], ["--bf16", "--alias", "half"]):
        done = CliRunner().invoke(app, [*words, *extra, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        made[bool(extra)] = json.loads(done.output)
    sizes = {half: one["files"]["adapter_model.safetensors"]["size_bytes"] for half, one in made.items()}
    assert sizes[True] < 0.8 * sizes[False]
    with Client(url) as client:
        for half, alias in ((False, "latest"), (True, "half")):
            call = ChatCall(f"base:elsewhere@{alias}", (Message("user", "Hello"),), max_tokens=3)
            assert client.chat(call).adapter_version == made[half]["version"]
    wrong = CliRunner().invoke(app, [words[0], words[1], str(tmp_path / "none"), *words[3:]])
    assert "adapter_config.json" in str(wrong.output) + str(wrong.exception)


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("card", "Did you mean base:card@prod?"),
        ("nothing", "exist. Models here: base"),
        ("bass", "Did you mean base?"),
        ("no such!", "Models here: base"),
    ],
)
def test_a_wrong_model_name_is_answered_with_the_nearest(
    parts: tuple[str, Store, list[str]], model: str, meant: str
) -> None:
    with Client(parts[0]) as client, pytest.raises(ApiError, match=re.escape(meant)) as caught:
        client.chat(ChatCall(model, (Message("user", "Hello"),), max_tokens=1))
    assert caught.value.status == 404


def test_a_damaged_version_is_refused_without_the_places_of_its_files(
    parts: tuple[str, Store, list[str]], tmp_path: Path
) -> None:
    url, store, _ = parts
    base = Path(store.uri).parent / "base"
    folder = write_lora(base, tmp_path / "peft", 9, r=2, target_modules=["q_proj"])
    words = ["adapters", "publish", str(folder), "broken", "--base", str(base), "--root", store.uri, "--json"]
    version = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).output)["version"]
    weights = Path(store.uri) / "adapters" / "broken" / version / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with Client(url) as client, pytest.raises(ApiError, match="sha256 differs") as caught:
        client.chat(ChatCall(f"base:broken@{version}", (Message("user", "Hello"),), max_tokens=1))
    assert f"{version}/adapter_model.safetensors" in caught.value.message
    assert store.uri not in caught.value.message
    shutil.rmtree(weights.parents[1])


def test_a_piped_table_breaks_no_name(parts: tuple[str, Store, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    command = [str(Path(sys.executable).with_name("graftwork")), "adapters", "ls", "--root", parts[1].uri]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(version in line and "card" in line for line in lines) for version in parts[2])
