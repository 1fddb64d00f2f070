"""A teacher that writes in this process."""

from collections.abc import Sequence

import torch

from graftwork import base_model, chat, data
from graftwork.chat import Message
from graftwork.training.objective_spec import GenerateSpec
from graftwork.training.spec import TrainSpec
from graftwork.training.teaching.answer import TeacherAnswer
from graftwork.training.teaching.model import load_teacher
from graftwork.training.teaching.teacher import Teacher


@torch.no_grad()
def write(
    spec: TrainSpec, generate: GenerateSpec, teacher: Teacher, questions: Sequence[Sequence[Message]]
) -> list[list[TeacherAnswer]]:
    """`generate.samples` answers to each question, by the teacher's own template and tokenizer."""
    template = base_model.template(base_model.resolve(teacher.base))
    prompt = data.resolve_prompt(spec.prompt)
    asked = [list(chat.render(q, template, prompt=prompt, generate=True).ids) for q in questions]
    device = torch.device("cuda:0" if spec.gpus and torch.cuda.is_available() else "cpu")
    model = load_teacher(teacher, spec.root, device)
    torch.manual_seed(spec.seed)
    order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
    found: list[list[TeacherAnswer]] = [[] for _ in asked]
    for start in range(0, len(order), generate.concurrency):
        places = order[start : start + generate.concurrency]
        width = max(len(asked[place]) for place in places)
        ids_BT = torch.tensor([[template.pad_id] * (width - len(asked[p])) + asked[p] for p in places], device=device)
        mask_BT = torch.tensor([[0] * (width - len(asked[p])) + [1] * len(asked[p]) for p in places], device=device)
        sampling = {"temperature": generate.temperature, "top_k": 0, "top_p": 1.0} if generate.temperature else {}
        whole = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, do_sample=generate.temperature > 0, **sampling,
            num_return_sequences=generate.samples, max_new_tokens=generate.max_new_tokens,
            pad_token_id=template.pad_id, eos_token_id=sorted(template.stop_ids),
        )  # fmt: skip
        for row, ids in enumerate(whole[:, width:].tolist()):
            found[places[row // generate.samples]].append(_answer(ids, template))
    return found


def _answer(ids: Sequence[int], template: chat.Template) -> TeacherAnswer:
    end = next((place for place, token in enumerate(ids) if token in template.stop_ids), None)
    return TeacherAnswer(template.decode(ids[:end]), end is not None)
