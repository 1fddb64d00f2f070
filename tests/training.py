"""A tiny training task: small enough for a second, real enough that its loss falls."""

import json
from pathlib import Path
from typing import Any

from graftwork.training.spec import TrainSpec
from tests.tiny import write_tiny_base

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "grey", "pink", "gold")


def write_rows(path: Path, count: int, first: int = 0, answer_repeats: int = 1) -> Path:
    """JSONL of `count` conversations with answers of varied length."""
    lines = []
    for number in range(first, first + count):
        colour = COLOURS[number % len(COLOURS)]
        answer = " ".join([colour] * (answer_repeats + number % 3))
        turns = [{"role": "user", "content": f"Name colour {number % 10}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"row{number}", "messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    """JSONL of `count` preferences: the right colour over the next one, as text or as turns."""
    lines = []
    for number in range(first, first + count):
        right, wrong = COLOURS[number % len(COLOURS)], COLOURS[(number + 1) % len(COLOURS)]
        prompt = f"Name colour {number % 10}"
        if number % 2:
            row: dict[str, Any] = {"prompt": prompt, "chosen": right, "rejected": f"{wrong} {wrong}"}
        else:
            turns = [{"role": "user", "content": prompt}]
            row = {"messages": turns, "chosen": {"role": "assistant", "content": right}, "rejected": wrong}
        lines.append(json.dumps({"id": f"pair{number}", **row}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pair_task(folder: Path, **changes: Any) -> TrainSpec:
    """`task` on 40 pairs, 10 held out, of which half name their prompt as `messages`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {f"data.{part}": str(folder / f"{part}-pairs.jsonl") for part in ("train", "eval")}
    if not Path(pairs["data.train"]).exists():
        write_pairs(Path(pairs["data.train"]), 40)
        write_pairs(Path(pairs["data.eval"]), 10, first=1000)
    return task(folder, **{"name": "pairs", "objective": {"kind": "dpo"}, **pairs, **changes})


def write_labelled(path: Path, count: int, first: int = 0, form: int = 0) -> Path:
    """JSONL of answers in one of three forms: two of three are right and have label true."""
    lines = []
    for number in range(first, first + count):
        right, wrong = COLOURS[number % len(COLOURS)], COLOURS[(number + 1) % len(COLOURS)]
        good = number % 3 != 0
        answer, prompt = right if good else f"{wrong} {wrong}", f"Name colour {number % 10}"
        asked, said = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
        forms: list[dict[str, Any]] = [
            {"prompt": prompt, "completion": answer},
            {"messages": [asked, said]},
            {"prompt": [asked], "completion": [said]},
        ]
        lines.append(json.dumps({"id": f"row{number}", **forms[form], "label": good}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def labelled_task(folder: Path, **changes: Any) -> TrainSpec:
    """`pair_task` on 42 labelled answers, 9 held out."""
    files = {f"data.{part}": folder / f"{part}-labelled.jsonl" for part in ("train", "eval")}
    if not files["data.train"].exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_labelled(files["data.train"], 42)
        write_labelled(files["data.eval"], 9, first=1000, form=1)
    rows = {key: str(file) for key, file in files.items()}
    return pair_task(folder, **{"objective": {"kind": "kto"}, **rows, **changes})


def task(folder: Path, **changes: Any) -> TrainSpec:
    """A spec on a tiny base with 48 training and 8 held-out rows, all files under `folder`; dotted keys change it.

    In fp32 on every machine: where bfloat16 is the default, sums in another order differ in the third digit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():
        write_tiny_base(base)
        write_rows(folder / "train.jsonl", 48)
        write_rows(folder / "eval.jsonl", 8, first=1000)
    spec = TrainSpec.model_validate(
        {
            "name": "colours",
            "root": str(folder / "root"),
            "base": str(base),
            "quant": {"dtype": "float32"},
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
            "optim": {"lr": 5e-3, "epochs": 2},
            "checkpoint_every": 4,
            "eval_every": 6,
        }
    )
    return spec.with_(changes)
