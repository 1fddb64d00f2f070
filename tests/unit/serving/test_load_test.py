"""An adapter is updated again and again under load: nothing fails, and each answer is that of the version it names.

What a version answers alone is PEFT's `generate`. A sequence that mixed two versions, or read the cached prefix of
another, would say something else: the versions' answers differ, prompts begin alike, and the prefix cache is in use.
"""

import asyncio
import itertools
import math
import random
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.serving.api.errors import ApiError
from graftwork.serving.arms import build_prompt
from graftwork.serving.messages import ArmRequest
from graftwork.serving.replica import EngineReplica
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import ALL, load_model, write_lora
from tests.replicas import answer
from tests.tiny import write_tiny_base

START = "Give the name, the city and the country of the aerodrome; how high above the sea does its runway lie? "
PROMPTS = tuple(START + end for end in ("KMG", "ZPPP", "Frankfurt", "EDDF"))
NEW_TOKENS, LIMIT, CALLERS = 8, 256, 24
CARD, OTHER = "card@latest", "other@latest"


@dataclass
class World:
    """A base, a store, and the versions of `card` in the order in which they are promoted; the last one of `other`."""

    base: Path
    store: Store
    folders: dict[str, Path]
    card: list[str]
    other: str


@dataclass(frozen=True)
class Answered:
    """One request: `oldest` and `newest` are the places in `World.card` that it may have been answered by."""

    ref: str | None
    prompt: str
    oldest: int
    newest: int
    version: str | None
    tokens: tuple[int, ...]
    cached: int


@dataclass
class Run:
    """What a run has seen. `confirmed`: the version that new requests get for certain; `begun`: that they may get.

    until: how many requests end it; known once the last update is made.
    """

    confirmed: int = 0
    begun: int = 0
    until: float = math.inf
    answered: list[Answered] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def ended(self) -> int:
        return len(self.answered) + len(self.errors)


def make_world(tmp: Path, updates: int) -> World:
    """`updates` + 1 versions of `card`, all weights of each its own."""
    base = write_tiny_base(tmp / "base")
    first = write_lora(base, tmp / "a0", 0, r=4, lora_alpha=16, target_modules=list(ALL))
    store, folders, versions = Store(str(tmp / "root")), {}, []
    digest = base_model.resolve(BaseSpec(uri=str(base))).digest
    for number in range(updates + 2):
        folder = first if number == 0 else varied(first, tmp / f"a{number}", number)
        task, alias = ("other", "latest") if number > updates else ("card", None if number else "latest")
        known = facts(base_digest=digest, prompt={})
        versions.append(artifact.publish(store, task, folder, **known, alias=alias).version)
        folders[versions[-1]] = folder
    return World(base, store, folders, versions[:-1], versions[-1])


def varied(source: Path, folder: Path, seed: int) -> Path:
    """An adapter of the same shapes with other weights."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(old.shape, generator=generator) * 0.1
        for name, old in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


async def play(world: World, requests: int) -> Run:
    """CALLERS ask without a pause until `requests` are answered and every update is made.

    After each update more requests are answered than there are callers, so that every version gets its own.
    """
    spec = ServeSpec.model_validate(
        {
            "base": str(world.base),
            "root": world.store.uri,
            "quant": {"kind": "none", "dtype": "float32"},
            "engine": {"max_seq_len": LIMIT, "max_batch": 16, "max_loaded": 4, "num_threads": 1, "kv_tokens": 8192},
        }
    )
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(spec.model_dump(mode="json"))  # type: ignore[misc]
    run, due = Run(), asyncio.Condition()
    rng = random.Random(0)
    refs, numbers = [CARD, CARD, CARD, OTHER, None], itertools.count()

    async def caller() -> None:
        while run.ended < run.until:
            await one(replica, run, next(numbers), rng.choice(refs), rng.choice(PROMPTS))
            async with due:
                due.notify_all()

    async def updater() -> None:
        for number in range(1, len(world.card)):
            next_at = run.ended + max(2 * CALLERS, requests // (len(world.card) + 1))
            async with due:
                await due.wait_for(lambda next_at=next_at: run.ended >= next_at)  # type: ignore[misc]
            run.begun = number
            await asyncio.to_thread(artifact.promote, world.store, "card", "latest", world.card[number])
            swapped = await replica.refresh(CARD)
            assert swapped["new"] == world.card[number]
            run.confirmed = number
        run.until = max(requests, run.ended + 2 * CALLERS)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(updater())
            for _ in range(CALLERS):
                group.create_task(caller())
    finally:
        await asyncio.to_thread(replica.stop)
    return run


async def one(replica: EngineReplica, run: Run, number: int, ref: str | None, prompt: str) -> None:
    arm = ArmSpec(name="a", adapter=ref, max_new_tokens=NEW_TOKENS)
    oldest = run.confirmed
    try:
        found = await answer(replica, ArmRequest(arm, prompt, f"r{number}", max_new_tokens=NEW_TOKENS))
    except ApiError as error:
        run.errors.append(str(error))
        return
    run.answered.append(
        Answered(ref, prompt, oldest, run.begun, found.adapter_version, found.token_ids, found.cached_tokens)
    )


def alone(world: World) -> dict[tuple[str | None, str], tuple[int, ...]]:
    """(version, prompt) -> what PEFT generates, up to and with the first stop token."""
    from peft import PeftModel

    template = base_model.template(base_model.resolve(BaseSpec(uri=str(world.base))))
    arm = ArmSpec(name="base")
    build = partial(build_prompt, arm, max_seq_len=LIMIT, max_new_tokens=NEW_TOKENS)
    prompts = {text: build(text, template) for text in PROMPTS}
    plain = load_model(world.base)
    said: dict[tuple[str | None, str], tuple[int, ...]] = {}
    said |= {(None, text): greedy(plain, prompt.ids, prompt.stop_ids) for text, prompt in prompts.items()}
    model: Any = None
    for version, folder in world.folders.items():
        if model is None:
            model = PeftModel.from_pretrained(plain, folder, adapter_name=version).eval()
        else:
            model.load_adapter(folder, adapter_name=version)
        model.set_adapter(version)
        said |= {(version, text): greedy(model, prompt.ids, prompt.stop_ids) for text, prompt in prompts.items()}
        if len(model.peft_config) > 1:
            model.delete_adapter(next(name for name in model.peft_config if name != version))
    return said


def greedy(model: Any, prompt: tuple[int, ...], stop_ids: frozenset[int]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens = out[0, len(prompt) :].tolist()
    end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tuple(tokens[: end + 1])


def prove(tmp: Path, requests: int, updates: int) -> None:
    world = make_world(tmp, updates)
    run = asyncio.run(play(world, requests))
    assert run.errors == []
    assert len(run.answered) >= requests
    assert run.confirmed == updates
    expected = alone(world)
    of_last_prompt = [expected[version, PROMPTS[-1]] for version in world.card]
    assert len(set(of_last_prompt)) > 0.9 * len(of_last_prompt), "versions that say the same would hide a mix-up"
    for one in run.answered:
        assert one.tokens == expected[one.version, one.prompt]
        if one.ref == CARD:
            assert one.version is not None
            assert one.oldest <= world.card.index(one.version) <= one.newest
        else:
            assert one.version == (world.other if one.ref else None)
    by_card = [one for one in run.answered if one.ref == CARD]
    assert {one.version for one in by_card} >= set(world.card[1:])
    assert sum(one.cached > 0 for one in by_card) > len(by_card) // 10, "no shared prefix, no proof about stale ones"


def test_300_requests_with_10_updates_answer_as_the_version_they_name(tmp_path: Path) -> None:
    prove(tmp_path, requests=300, updates=10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_10000_requests_with_200_updates_answer_as_the_version_they_name(tmp_path: Path) -> None:
    prove(tmp_path, requests=10_000, updates=200)
