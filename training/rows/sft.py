"""Conversations: rendered by `chat.render`, retrieved passages among them where `data.context` asks for them."""

from collections.abc import Sequence

from graftwork import chat, data, retrieval
from graftwork.training.rows.part import Part, ReadPart, nothing_left, too_long
from graftwork.training.rows.token_rows import TokenRows
from graftwork.training.spec import TrainSpec


def read(spec: TrainSpec, template: chat.Template, part: Part) -> ReadPart:
    """The rows that fit, as ids and loss masks. Raises DataError, StorageError."""
    uri, limit = (spec.data.train, spec.data.train_rows) if part == "train" else (spec.data.eval, spec.data.eval_rows)
    assert uri is not None, "asked for a part that the spec has"
    raw = data.read_rows(uri, limit=limit, need="train")
    prompt = data.resolve_prompt(spec.prompt)
    contexts: list[tuple[chat.Passage, ...]] = [()] * len(raw)
    room, left_out = None, 0
    if spec.data.context is not None:
        contexts = retrieval.training_contexts(raw, spec.data.context, spec.seed if part == "train" else spec.seed + 1)
        room = spec.data.context.context_tokens
    fitting: list[tuple[Sequence[int], Sequence[bool]]] = []
    dropped = 0
    for number, (row, context) in enumerate(zip(raw, contexts, strict=True), start=1):
        context, without = chat.fitting(context, template, prompt, room)
        left_out += len(without)
        for messages in chat.training_rows(row.messages, template):
            rendered = chat.render(messages, template, prompt=prompt, context=context, generate=False)
            if len(rendered.ids) <= spec.max_length:
                fitting.append((rendered.ids, rendered.loss_mask))
                continue
            dropped += 1
            if spec.too_long == "refuse":
                raise too_long(spec, part, number, row.id, len(rendered.ids))
    if not fitting:
        raise nothing_left(spec, part, dropped)
    return ReadPart(TokenRows.of(fitting), dropped, data.fingerprint(raw), _notes(left_out, room))


def _notes(left_out: int, room: int | None) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (f"{left_out} passages left out (no room in data.context.context_tokens={room})",)
