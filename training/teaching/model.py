"""A teacher in this process: frozen, on a base of its own."""

from typing import Any

import torch
from peft import PeftModel

from graftwork import artifact, base_model
from graftwork.storage import Store
from graftwork.training.teaching.teacher import Teacher


def load_teacher(teacher: Teacher, root: str, device: torch.device) -> Any:
    """The frozen teacher on a base of its own in this process."""
    place = "cpu" if device.type == "cpu" else str(device)  # ranks of gloo call it cpu:0
    loaded = base_model.load(base_model.resolve(teacher.base), teacher.quant, device=place, purpose="train")
    model = loaded.model
    if teacher.adapter is not None:
        task, _, version = teacher.adapter.partition("@")
        model = PeftModel.from_pretrained(model, artifact.fetch(Store(root), task, version))
    return model.requires_grad_(False).eval()
