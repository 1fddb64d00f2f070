"""Distillation teachers: a model in this process or an endpoint, and the cache of the answers that they generated.

<root>/teaching/<key>/{answers.jsonl, about.json}
"""

import hashlib
import json
import os
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any

import httpx
import torch
from peft import PeftModel

from graftwork.artifacts.publish import fetch, require_base
from graftwork.artifacts.registry import resolve
from graftwork.base import source
from graftwork.base.load import load
from graftwork.base.load import resolve as resolve_base
from graftwork.base.load import template as base_template
from graftwork.base.source import BaseSpec
from graftwork.config import canonical_json
from graftwork.datasets.rows import (
    DatasetRow,
    fingerprint,
    key_check,
    prompt_content,
    read_rows,
    render_question,
    resolve_prompt,
)
from graftwork.errors import ArtifactError, BaseModelError, ConfigError, DataError
from graftwork.prompts.render import Message, PromptSpec, message_fields
from graftwork.prompts.template import Template
from graftwork.quantization import QuantSpec
from graftwork.storage.store import Store
from graftwork.training.objectives.distill import DistillSpec, GenerateSpec, TeacherSpec
from graftwork.training.objectives.rows import pad_left
from graftwork.training.rewards import Reward, load_rewards
from graftwork.training.spec import TrainSpec


@dataclass(frozen=True)
class TeacherAnswer:
    """A generated text; `ended` by the teacher itself and not by the limit on its length."""

    text: str
    ended: bool


TIMEOUT_S = 600.0
TRIES = 4
"""Of a request that the endpoint has no room for (429, 503); 1, 2 and 4 s lie between."""


def ask(generate: GenerateSpec, rows: Sequence[DatasetRow], prompt: PromptSpec, seed: int) -> list[list[TeacherAnswer]]:
    """`generate.samples` answers to each question. Raises DataError naming what the endpoint said, ConfigError."""
    assert generate.url is not None, "asked where there is an endpoint"
    bodies = []
    for row in rows:
        own = []
        if prompt.system is not None and row.question[0].role not in ("system", "developer"):
            own = [Message("system", prompt.system)]
        variables = {**prompt.chat_template_kwargs, **row.template_kwargs}
        body = {
            "model": generate.model,
            "messages": [message_fields(turn) for turn in (*own, *row.question)],
            "temperature": generate.temperature,
            "max_tokens": generate.max_new_tokens,
            **({"chat_template_kwargs": variables} if variables else {}),
        }
        bodies += [{**body, "seed": seed + n} for n in range(generate.samples)]
    with (
        httpx.Client(base_url=generate.url.rstrip("/") + "/", headers=_headers(generate), timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(generate.concurrency, thread_name_prefix="teacher") as pool,
    ):
        answers = [pool.submit(_ask_once, client, generate, body) for body in bodies]
        try:
            found = [answer.result() for answer in answers]
        finally:
            pool.shutdown(cancel_futures=True)
    return [found[start : start + generate.samples] for start in range(0, len(found), generate.samples)]


def _ask_once(client: httpx.Client, generate: GenerateSpec, body: dict[str, Any]) -> TeacherAnswer:
    for attempt in range(TRIES):
        try:
            response = client.post("chat/completions", json=body)
        except httpx.HTTPError as error:
            raise _request_error(generate, f"nothing answers ({error})") from error
        if response.status_code not in (429, 503) or attempt == TRIES - 1:
            break
        time.sleep(2.0**attempt)
    if response.is_error:
        raise _request_error(generate, f"HTTP {response.status_code}: {response.text[:500]}")
    try:
        choice = response.json()["choices"][0]
        return TeacherAnswer(str(choice["message"]["content"] or ""), choice["finish_reason"] == "stop")
    except (ValueError, LookupError, TypeError) as error:
        raise _request_error(generate, f"its answer is no chat completion: {response.text[:500]}") from error


def _headers(generate: GenerateSpec) -> dict[str, str]:
    if generate.api_key_env is None:
        return {}
    key = os.environ.get(generate.api_key_env)
    if not key:
        raise ConfigError(
            f"objective.generate.api_key_env={generate.api_key_env}",
            "the variable is not set",
            "it holds the endpoint's key",
            f"export {generate.api_key_env}=...",
        )
    return {"Authorization": f"Bearer {key}"}


def _request_error(generate: GenerateSpec, found: str) -> DataError:
    return DataError(
        f"objective.generate.url={generate.url}, model={generate.model}",
        found,
        "the teacher answers POST URL/chat/completions for each training row",
        "check url and model (GET URL/models lists them), or start the endpoint: graftwork serve FILE",
    )


@dataclass(frozen=True)
class Teacher:
    """A teacher that no later publication changes."""

    base: BaseSpec
    base_digest: str
    quant: QuantSpec
    adapter: str | None
    """`task@version`."""
    template_date: date | None = None
    """The day that its chat template writes as today's, where it writes one."""

    def digest(self) -> str:
        """sha256 hex over what decides its distributions."""
        what = [self.base_digest, self.quant.model_dump(mode="json", exclude={"resident"}), self.adapter]
        what += [self.template_date.isoformat()] if self.template_date else []
        return hashlib.sha256(canonical_json(what).encode()).hexdigest()


def pinned(spec: TrainSpec, asked: TeacherSpec) -> Teacher:
    """The teacher by digest and version. Raises ArtifactError, BaseModelError: missing, or no teacher."""
    base = asked.base or spec.base
    resolved = resolve_base(base)
    adapter, changes = None, {"uri": source.absolute(base.uri)}
    if asked.adapter is not None:
        manifest = resolve(Store(spec.root), asked.adapter)
        require_base(manifest, resolved.digest)
        if manifest.method.get("objective") == "reward":
            raise ArtifactError(
                f"objective.teacher.adapter={asked.adapter}",
                "it is a reward model",
                "a teacher writes tokens",
                "name another adapter",
            )
        adapter = manifest.ref
        if manifest.template_date is not None:
            changes["template_date"] = manifest.template_date.isoformat()
    placed = base.with_(changes)
    day = base_template(resolve_base(placed)).date
    return Teacher(placed, resolved.digest, asked.quant or spec.quant, adapter, day)


def require_vocabulary(spec: TrainSpec, teacher: Teacher, template: Template) -> None:
    """Raise BaseModelError unless student and teacher have one vocabulary."""
    theirs, own = resolve_base(teacher.base), resolve_base(spec.base)
    sizes = [int(one.config.get("vocab_size", 0)) for one in (theirs, own)]
    if base_template(theirs).tokenizer_digest == template.tokenizer_digest and sizes[0] == sizes[1]:
        return
    raise BaseModelError(
        f"objective.teacher.base={teacher.base.uri}",
        f"its vocabulary ({sizes[0]} tokens) is not that of base={spec.base.uri} ({sizes[1]} tokens)",
        "distributions are compared token by token, so teacher and student have one tokenizer",
        "take a teacher of the student's family, or let it write answers and learn those (objective.generate)",
    )


def load_teacher(teacher: Teacher, root: str, device: torch.device) -> Any:
    """The frozen teacher on a base of its own in this process."""
    place = "cpu" if device.type == "cpu" else str(device)  # ranks of gloo call it cpu:0
    loaded = load(resolve_base(teacher.base), teacher.quant, device=place, purpose="train")
    model = loaded.model
    if teacher.adapter is not None:
        task, _, version = teacher.adapter.partition("@")
        model = PeftModel.from_pretrained(model, fetch(Store(root), task, version))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def write(
    spec: TrainSpec, generate: GenerateSpec, teacher: Teacher, rows: Sequence[DatasetRow]
) -> list[list[TeacherAnswer]]:
    """`generate.samples` answers to each question, by the teacher's own template and tokenizer."""
    template = base_template(resolve_base(teacher.base))
    prompt = resolve_prompt(spec.prompt)
    asked = [render_question(row, template, prompt, (), "keep").ids for row in rows]
    device = torch.device("cuda:0" if spec.gpus and torch.cuda.is_available() else "cpu")
    model = load_teacher(teacher, spec.root, device)
    torch.manual_seed(spec.seed)
    order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
    found: list[list[TeacherAnswer]] = [[] for _ in asked]
    for start in range(0, len(order), generate.concurrency):
        places = order[start : start + generate.concurrency]
        ids_BT, mask_BT = pad_left([asked[place] for place in places], template.pad_id, device)
        sampling = {"temperature": generate.temperature, "top_k": 0, "top_p": 1.0} if generate.temperature else {}
        whole = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            do_sample=generate.temperature > 0,
            **sampling,
            num_return_sequences=generate.samples,
            max_new_tokens=generate.max_new_tokens,
            pad_token_id=template.pad_id,
            eos_token_id=sorted(template.stop_ids),
        )
        for row, ids in enumerate(whole[:, ids_BT.shape[1] :].tolist()):
            end = next((place for place, token in enumerate(ids) if token in template.stop_ids), None)
            found[places[row // generate.samples]].append(TeacherAnswer(template.decode(ids[:end]), end is not None))
    return found


FOLDER, ANSWERS, ABOUT = "teaching", "answers.jsonl", "about.json"


@dataclass(frozen=True)
class GeneratedAnswers:
    """Rows with a teacher's answers."""

    uri: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    """Ignored keys of the rows that the questions come from."""
    contents: "array[int]"
    """A hash of each of those rows, as `ReadPart.contents`."""


def load_or_generate(spec: TrainSpec, generate: GenerateSpec) -> GeneratedAnswers:
    """The training rows with the teacher's answers. In the driver; generates them where they are not there yet.

    Raises DataError (no endpoint, no answer kept), ArtifactError, BaseModelError, ConfigError (an unknown reward).
    """
    keys = key_check("prompt")
    source = spec.data.source("train", spec.seed)
    rows = read_rows(source, limit=spec.data.train_rows, need="prompt", keys=keys)
    loaded = load_rewards([generate.keep] if generate.keep else [], spec)
    rewards = [reward for reward in loaded if isinstance(reward, Reward)]
    store, key = Store(spec.root), _key(spec, generate, rows, rewards)
    if not store.exists(FOLDER, key, ABOUT):
        _require_text(spec, rows)
        if generate.url is not None:
            answers = ask(generate, rows, spec.prompt, spec.seed)
        else:
            assert isinstance(spec.objective, DistillSpec)
            assert spec.objective.teacher is not None, "one of the two is given"
            answers = write(spec, generate, pinned(spec, spec.objective.teacher), rows)
        kept = [
            (row, best) for row, own in zip(rows, answers, strict=True) if (best := _best(generate, rewards, row, own))
        ]
        about = {
            "asked": len(rows),
            "kept": len(kept),
            "unended": sum(not any(a.ended for a in own) for own in answers),
        }
        if not kept:
            raise _nothing_kept(spec, generate, about, answers)
        lines = []
        for row, text in kept:
            turns = [message_fields(turn) for turn in row.question]
            record: dict[str, Any] = {"id": row.id, "messages": [*turns, {"role": "assistant", "content": text}]}
            if row.template_kwargs:
                record["chat_template_kwargs"] = dict(row.template_kwargs)
            if row.gold is not None:
                record |= {"gold": row.gold, "given_fields": list(row.given_fields)}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        store.write_bytes("".join(lines).encode(), FOLDER, key, ANSWERS)
        store.write_json(about, FOLDER, key, ABOUT)
    about = store.read_json(FOLDER, key, ABOUT)
    rule = f"keep={generate.keep.name}, at_least={generate.at_least:g}" if generate.keep else "ended"
    note = f"{about['kept']} of {about['asked']} answers of the teacher kept ({rule}; {about['unended']} had not ended)"
    contents = array("q", [row.content_hash() for row in rows])
    return GeneratedAnswers(store.path(FOLDER, key, ANSWERS), (note,), keys.note("train"), contents)


def _require_text(spec: TrainSpec, rows: Sequence[DatasetRow]) -> None:
    """Raise DataError for functions: a teacher's answers are read as text."""
    for row in rows:
        if spec.prompt.tools or row.tools or any(turn.role == "tool" for turn in row.messages):
            raise DataError(
                f"objective.generate: row {row.id}: tools",
                "the conversation has functions",
                "a teacher's answers are text, and calls would not be read from it",
                "take rows without tools, or train on written answers with objective.kind=sft",
            )


def _best(
    generate: GenerateSpec, rewards: Sequence[Reward], row: DatasetRow, answers: Sequence[TeacherAnswer]
) -> str | None:
    """The best answer that has ended and is good enough; of equal ones the first."""
    ended = [answer.text for answer in answers if answer.ended and answer.text.strip()]
    if not rewards or not ended:
        return ended[0] if ended else None
    value, place = max((rewards[0].compute(text, row), -place) for place, text in enumerate(ended))
    return ended[-place] if value >= generate.at_least else None


def _key(spec: TrainSpec, generate: GenerateSpec, rows: Sequence[DatasetRow], rewards: Sequence[Reward]) -> str:
    """32 hex digits over all that decides the answers and their selection."""
    assert isinstance(spec.objective, DistillSpec)
    teacher = spec.objective.teacher
    decides = {
        "rows": fingerprint(rows),
        "prompt": prompt_content(resolve_prompt(spec.prompt)),
        "seed": spec.seed,
        "generate": generate.model_dump(mode="json", exclude={"concurrency", "api_key_env"}),
        "keep": [reward.content for reward in rewards],
        "teacher": pinned(spec, teacher).digest() if teacher else None,
    }
    return hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:32]


def _nothing_kept(
    spec: TrainSpec, generate: GenerateSpec, about: dict[str, int], answers: Sequence[Sequence[TeacherAnswer]]
) -> DataError:
    rule = (
        f"keep={generate.keep.name} of at least {generate.at_least:g}" if generate.keep else "an end within the limit"
    )
    return DataError(
        f"objective.generate for train={spec.data.source('train', spec.seed)}",
        f"none of the answers to {about['asked']} questions is kept ({about['unended']} had not ended); the first is "
        f"{answers[0][0].text[:200]!r}",
        f"an answer is learned that has {rule}",
        "look at the teacher and its prompt, raise max_new_tokens, or lower at_least",
    )
