"""What a teacher writes: asked once for a set of questions, filtered, and kept under the root by what decided it.

<root>/teaching/<key>/{answers.jsonl, about.json}
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graftwork import data
from graftwork.config import canonical_json
from graftwork.data import DatasetRow
from graftwork.errors import DataError
from graftwork.storage import Store
from graftwork.training.objective_spec import DistillSpec, GenerateSpec
from graftwork.training.rewards.load import load_rewards
from graftwork.training.rewards.reward import Reward
from graftwork.training.spec import TrainSpec
from graftwork.training.teaching.answer import TeacherAnswer
from graftwork.training.teaching.endpoint import ask
from graftwork.training.teaching.teacher import pinned

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
    """The training rows with the teacher's answers. In the driver; asks it where they are not there yet.

    Raises DataError (no endpoint, no answer kept), ArtifactError, BaseModelError, ConfigError (an unknown reward).
    """
    assert spec.data.train is not None
    keys = data.key_check("prompt")
    rows = data.read_rows(spec.data.train, limit=spec.data.train_rows, need="prompt", keys=keys)
    loaded = load_rewards([generate.keep] if generate.keep else [], spec)
    rewards = [reward for reward in loaded if isinstance(reward, Reward)]
    store, key = Store(spec.root), _key(spec, generate, rows, rewards)
    if not store.exists(FOLDER, key, ABOUT):
        answers = _generate(spec, generate, rows)
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
        lines = "".join(json.dumps(_record(row, text), ensure_ascii=False) + "\n" for row, text in kept)
        store.write_bytes(lines.encode(), FOLDER, key, ANSWERS)
        store.write_json(about, FOLDER, key, ABOUT)
    about = store.read_json(FOLDER, key, ABOUT)
    rule = f"keep={generate.keep.name}, at_least={generate.at_least:g}" if generate.keep else "ended"
    note = f"{about['kept']} of {about['asked']} answers of the teacher kept ({rule}; {about['unended']} had not ended)"
    contents = array("q", [hash(row.messages) for row in rows])
    return GeneratedAnswers(store.path(FOLDER, key, ANSWERS), (note,), keys.note("data.train"), contents)


def _generate(spec: TrainSpec, generate: GenerateSpec, rows: Sequence[DatasetRow]) -> list[list[TeacherAnswer]]:
    """The answers to each row's question."""
    if generate.url is not None:
        return ask(generate, [row.question for row in rows], spec.prompt.system, spec.seed)
    from graftwork.training.teaching.writer import write

    assert isinstance(spec.objective, DistillSpec)
    assert spec.objective.teacher is not None, "one of the two is given"
    return write(spec, generate, pinned(spec, spec.objective.teacher), [row.question for row in rows])


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
    """32 hex digits over all that decides the answers and which of them are kept."""
    assert isinstance(spec.objective, DistillSpec)
    teacher = spec.objective.teacher
    decides = {
        "rows": data.fingerprint(rows), "prompt": asdict(data.resolve_prompt(spec.prompt)), "seed": spec.seed,
        "generate": generate.model_dump(mode="json", exclude={"concurrency", "api_key_env"}),
        "keep": [reward.content for reward in rewards], "teacher": pinned(spec, teacher).digest() if teacher else None,
    }  # fmt: skip
    return hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:32]


def _record(row: DatasetRow, answer: str) -> dict[str, Any]:
    turns = [{"role": m.role, "content": m.content} for m in row.question]
    found: dict[str, Any] = {"id": row.id, "messages": [*turns, {"role": "assistant", "content": answer}]}
    if row.gold is not None:
        found |= {"gold": row.gold, "given_fields": list(row.given_fields)}
    return found


def _nothing_kept(
    spec: TrainSpec, generate: GenerateSpec, about: dict[str, int], answers: Sequence[Sequence[TeacherAnswer]]
) -> DataError:
    rule = (
        f"keep={generate.keep.name} of at least {generate.at_least:g}" if generate.keep else "an end within the limit"
    )
    return DataError(
        f"objective.generate for data.train={spec.data.train}",
        f"none of the answers to {about['asked']} questions is kept ({about['unended']} had not ended); the first is "
        f"{answers[0][0].text[:200]!r}",
        f"an answer is learned that has {rule}",
        "look at the teacher and its prompt, raise max_new_tokens, or lower at_least",
    )
