"""What a training row is given to read: what the served retriever would have brought, its gold passage among it."""

import random
from collections.abc import Callable

from graftwork.chat import Passage
from graftwork.data import ContextSpec, DatasetRow
from graftwork.errors import DataError
from graftwork.retrieval.hit import Retriever
from graftwork.retrieval.retriever import open_retriever
from graftwork.retrieval.spec import RetrieverSpec


def training_context(spec: ContextSpec, seed: int) -> Callable[[DatasetRow], tuple[Passage, ...]]:
    """Row -> the passages it is trained with: gold and distractors in the order the retriever ranks them.

    Distractors are what the retriever finds beside the gold passage, so they are of the kind that it will bring when
    served. A gold passage that it misses takes the last place. Depends on (seed, row id) only, not on other rows.
    The call raises DataError for a row whose doc_id is missing or not in the corpus.
    """
    index = open_retriever(RetrieverSpec(corpus=spec.corpus, k=spec.k))
    return lambda row: _training_context(row, spec, seed, index)


def _training_context(row: DatasetRow, spec: ContextSpec, seed: int, index: Retriever) -> tuple[Passage, ...]:
    chance = random.Random(f"{seed} {row.id}")
    plain, with_gold = chance.random() < spec.plain_rate, chance.random() < spec.gold_rate
    gold = index.get(row.doc_id) if row.doc_id is not None else None
    if gold is None:
        raise DataError(f"row {row.id}: doc_id", f"{row.doc_id!r} is no passage of {spec.corpus}",
                        "a row trained with context names its gold passage", "add doc_id, or drop data.context"
                        )  # fmt: skip
    if plain:
        return ()
    found = [hit.passage for hit in index.search(row.question[-1].content, spec.k + 1)]
    if not with_gold:
        return tuple([passage for passage in found if passage.id != gold.id][: spec.k])
    found = found[: spec.k]
    return tuple(found) if gold in found else (*found[: spec.k - 1], gold)
