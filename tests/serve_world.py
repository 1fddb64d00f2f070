"""A store for tests of endpoints: a tiny base, adapters made by PEFT and really published, and what each answers."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.artifacts.publish import publish
from graftwork.base import load
from graftwork.base.source import BaseSpec
from graftwork.prompts.render import Message, Prompt, render
from graftwork.prompts.template import Template
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import ALL, peft_greedy, write_lora
from tests.ports import free_port
from tests.tiny import write_tiny_base

SYSTEM = "Answer with one JSON object."
QUESTIONS = ("Which airport has the ICAO code ZPPP?", "How high above the sea does KMG lie?", "Hello")
NEW_TOKENS = 12
TASKS = ("card", "agent", "third")
FLIPS = 5
TOKEN, ADMIN_TOKEN = "correct horse battery staple", "battery staple of the owner"
AUTH = {"authorization": f"Bearer {TOKEN}"}
OWNER = {"authorization": f"Bearer {ADMIN_TOKEN}"}


@dataclass(frozen=True)
class World:
    """A store with a base, one version of each task, and FLIPS more of `card`. The texts come from PEFT."""

    base: Path
    store: Store
    corpus: Path
    versions: dict[str, str]
    """Of the tasks at the start."""
    newer: tuple[str, ...]
    texts: dict[tuple[str | None, str], str]
    """(version, question) -> what it answers greedily; version None is the base."""

    def spec(self, **changed: Any) -> ServeSpec:
        usual: dict[str, Any] = {
            "base": str(self.base),
            "root": self.store.uri,
            "port": free_port(),
            "quant": {"kind": "none", "dtype": "float32"},
            "adapters": [f"{task}@latest" for task in TASKS],
            "engine": {"max_seq_len": 1024, "num_threads": 1},
            "arms": [
                {"name": "plain", "prompt": {"system": SYSTEM}, "max_new_tokens": NEW_TOKENS},
                {"name": "rag", "adapter": "card@latest", "retriever": {"corpus": str(self.corpus), "k": 2}},
            ],
        }
        return ServeSpec(**{**usual, **changed})


def make_world(tmp: Path) -> World:
    """Publish the versions below `tmp`; each must have an answer of its own, or no mix-up shows."""
    base = write_tiny_base(tmp / "base")
    resolved = load.resolve(BaseSpec(uri=str(base)))
    template = load.template(resolved)
    store = Store(str(tmp / "root"))
    folders: dict[str, Path] = {}

    def add(task: str, seed: int, alias: str | None) -> str:
        folder = write_lora(base, tmp / f"lora{seed}", seed, r=4, lora_alpha=16, target_modules=list(ALL))
        known = facts(base_digest=resolved.digest, prompt={"system": SYSTEM})
        version = publish(store, task, folder, **known, alias=alias).version
        folders[version] = folder
        return version

    versions = {task: add(task, seed, "latest") for seed, task in enumerate(TASKS)}
    newer = tuple(add("card", 10 + number, None) for number in range(FLIPS))
    texts: dict[tuple[str | None, str], str] = {}
    said: dict[str | None, list[str]] = {None: expected(base, None, template, None)}
    said |= {version: expected(base, folder, template, SYSTEM) for version, folder in folders.items()}
    for version, answers in said.items():
        texts |= {(version, question): text for question, text in zip(QUESTIONS, answers, strict=True)}
    assert len(set(texts.values())) == len(texts), "each version must have an answer of its own, or no mix-up shows"
    corpus = tmp / "corpus.jsonl"
    passages = {"ZPPP": "ZPPP is Kunming Wujiaba in China", "EDDF": "EDDF is Frankfurt", "KJFK": "KJFK is New York"}
    corpus.write_text("".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in passages.items()))
    return World(base, store, corpus, versions, newer, texts)


def expected(base: Path, adapter: Path | None, template: Template, system: str | None) -> list[str]:
    """PEFT's own greedy answers to the questions, up to the first stop token."""
    prompts = [render([Message("user", q)], template, prompt=Prompt(system), generate=True) for q in QUESTIONS]
    answers = peft_greedy(base, adapter, [prompt.ids for prompt in prompts], NEW_TOKENS)
    stop = template.stop_ids
    return [template.decode(list(itertools.takewhile(lambda token: token not in stop, ids))) for ids in answers]
