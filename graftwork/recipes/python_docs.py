"""python-docs: the Python language reference as plain text, as the interpreter's `help()` carries it.

Source: `pydoc_data.topics` of the running Python (PSF licence). A row is one topic.
"""

import ast
import json

from graftwork.recipes import Built, PythonSource, jsonl, split_of

SOURCE = PythonSource(("pydoc_data/topics.py",))
LICENCE = "PSF-2.0"


def make(source: bytes) -> Built:
    """Topics, parted by name. A paragraph that a held-out topic has too is cut from the others: topics overlap."""
    topics = topics_of(source)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "eval": []}
    for name in topics:
        parts[split_of(name)].append(name)
    held_out = {text for name in parts["valid"] + parts["eval"] for text in topics[name].split("\n\n")}
    rows = {
        part: [
            {"id": name, "text": topics[name] if part != "train" else _drop_paragraphs(topics[name], held_out)}
            for name in names
        ]
        for part, names in parts.items()
    }
    files = {f"{part}.jsonl": jsonl([row for row in found if row["text"].strip()]) for part, found in rows.items()}
    return Built(files, {"split": "by the topic's name", "overlap": "held-out paragraphs are cut from train"})


def topics_of(source: bytes) -> dict[str, str]:
    """Name of the topic -> its text, read as data from the module's source."""
    (module,) = json.loads(source).values()
    assigned = next(node for node in ast.parse(module).body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assigned.value)
    return {name: topics[name].strip() for name in sorted(topics)}


def _drop_paragraphs(text: str, paragraphs: set[str]) -> str:
    return "\n\n".join(part for part in text.split("\n\n") if part not in paragraphs)
