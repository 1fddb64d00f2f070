"""element-prose: plain English about the chemical elements, to see what a finetuned model still knows of the language.

Source: mendeleev (MIT). A row is a question and what the encyclopedia says, as the one continuation to be weighed.
"""

import sqlite3
from typing import Any

from graftwork.base.package_source import PackageFile
from graftwork.recipes import Built, jsonl

SOURCE = PackageFile(
    "mendeleev",
    "1.3.0",
    "mendeleev/elements.db",
    "8a6312b57603e22c58ab28005bb8cacfbff721bc859eea8ddc2b784c17ffd717",
)
LICENCE = "MIT"

_QUESTIONS = {
    "description": "What kind of element is {name}?",
    "sources": "Where does {name} come from?",
    "uses": "What is {name} used for?",
}
_SHORTEST = 40


def make(source: bytes) -> Built:
    """Rows of one continuation each, from the elements' table."""
    database = sqlite3.connect(":memory:")
    database.deserialize(source)
    columns = ", ".join(_QUESTIONS)
    elements = database.execute(f"SELECT name, {columns} FROM elements ORDER BY atomic_number").fetchall()
    rows = [
        _row(name, part, " ".join(text.split()))
        for name, *texts in elements
        for part, text in zip(_QUESTIONS, texts, strict=True)
        if text and len(text) >= _SHORTEST
    ]
    return Built({"text.jsonl": jsonl(rows)}, {"question": "by the element's name", "shortest_text": _SHORTEST})


def _row(name: str, part: str, text: str) -> dict[str, Any]:
    turn = {"role": "user", "content": _QUESTIONS[part].format(name=name.lower())}
    gold = {"choices": [text], "right": 0}
    return {"id": f"{name.lower()}-{part}", "messages": [turn], "doc_id": name, "gold": gold}
