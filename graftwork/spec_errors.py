"""Error messages of specs: one pydantic error becomes subject, problem, rule and hint in the words of a spec file."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from graftwork.storage.store import ALIAS_PATTERN, NAME_PATTERN

PEER_KEYS = {
    "base_model": "base",
    "model": "base",
    "model_name_or_path": "base",
    "model_id": "base",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "dataset_path": "data.train",
    "eval_dataset": "data.eval",
    "val_dataset": "data.eval",
    "validation_file": "data.eval",
    "val_set_size": "data.eval",
    "val_size": "data.eval",
    "split_dataset_ratio": "data.eval",
    "test_size": "data.eval",
    "dataset_text_field": "data.columns",
    "dataset_mixture": "data.train",
    "output_dir": "root",
    "load_in_4bit": "quant.kind",
    "load_in_8bit": "quant.kind",
    "quantization": "quant.kind",
    "quantization_bit": "quant.kind",
    "bf16": "quant.dtype",
    "fp16": "quant.dtype",
    "torch_dtype": "quant.dtype",
    "learning_rate": "optim.lr",
    "num_train_epochs": "optim.epochs",
    "num_epochs": "optim.epochs",
    "per_device_train_batch_size": "optim.micro_batch",
    "micro_batch_size": "optim.micro_batch",
    "batch_size": "optim.rows_per_step",
    "train_batch_size": "optim.rows_per_step",
    "global_batch_size": "optim.rows_per_step",
    "gradient_accumulation_steps": "optim.rows_per_step",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "warmup_steps": "optim.warmup_ratio",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "optimizer": "optim.kind",
    "min_lr_rate": "optim.min_lr_ratio",
    "cosine_min_lr_ratio": "optim.min_lr_ratio",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target": "adapter.target_modules",
    "modules_to_save": "adapter.modules_to_save",
    "lora_modules_to_save": "adapter.modules_to_save",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_model_len": "engine.max_seq_len",
    "max_loras": "engine.max_loaded",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "system_prompt": "prompt.system",
    "save_steps": "checkpoint_every",
    "eval_steps": "eval_every",
    "max_lora_rank": "engine.max_rank",
    "max_num_seqs": "engine.max_batch",
    "api_key": "token_env",
}
"""Keys of axolotl, LLaMA-Factory, TRL, PEFT, Unsloth and vLLM -> the key here. Named only where a spec has that key."""

RENAMED_KEYS = {
    "too_long": "on_overlong",
    "shots_from": "few_shot_file",
    "stack_on": "base_adapter",
    "gang": "distributed",
    "together": "share_base",
    "goals": "objectives",
    "keep_s": "ttl_s",
    "matters": "min_share",
    "published": "paper",
    "differs": "deviations",
    "says": "statement",
    "loss": "loss_type",
}
"""Old key -> new key. An old key is rejected with the new name, where the spec has the new one."""

RENAMED_KINDS = {"command": "exec"}
"""Old `kind` of a spec file -> new one."""

_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number (integer)",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}

PEER_VALUES = {
    "4bit": "nf4",
    "4-bit": "nf4",
    "int4": "nf4",
    "fp4": "nf4",
    "8bit": "int8",
    "8-bit": "int8",
    "bf16": "bfloat16",
    "fp32": "float32",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "warmup_stable_decay": "wsd",
    "all": "all-linear",
    "all_linear": "all-linear",
}
"""Values of the same tools -> the value here, named only where a key takes it."""

_PATTERNS = {
    NAME_PATTERN: "a name has lower-case letters, digits, '.', '_', '-', at most 63, and begins with a letter or digit",
    ALIAS_PATTERN: "an adapter is named TASK@ALIAS, e.g. support@latest",
}


def explain_error(cls: type[BaseModel], error: dict[str, Any], tree: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return (subject, problem, rule, hint) of one entry of `ValidationError.errors()` about `tree` as a `cls`."""
    keys = [str(part) for part in error["loc"] if _in_tree(tree, error["loc"], part) or error["type"] == "missing"]
    dotted, kind, given = ".".join(keys), error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown_key(cls, error, keys, tree)
    if kind == "missing":
        return dotted, "the key is missing", "it has no default", f"add '{keys[-1]}:'"
    if kind == "union_tag_not_found":
        tags = re.findall(r"'([^']+)'", str(error["ctx"]["discriminator"]))
        subject = ".".join([*keys, *tags])
        return subject, "the key is missing", "it selects one of several forms", f"add '{tags[0]}:'"
    if kind == "union_tag_invalid":
        tag, known = str(error["ctx"]["tag"]), re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        return f"{dotted}.kind={tag!r}", "no such kind", f"kind is one of {', '.join(known)}", did_you_mean(tag, known)
    subject = dotted if isinstance(given, Mapping | list | tuple) else f"{dotted}={_short(given)}"
    problem, rule, hint = _problem(cls, keys, kind, error)
    return subject if keys else "the spec", problem, rule, hint


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return a question that names the nearest of `known`, or an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def _problem(cls: type[BaseModel], keys: Sequence[str], kind: str, error: Mapping[str, Any]) -> tuple[str, str, str]:
    given, context = error["input"], error.get("ctx", {})
    if kind in _TYPES:
        hint = ""
        if kind in ("model_type", "model_attributes_type", "dict_type"):
            known = _keys_of(_models_at(cls, keys))
            hint = (
                f"write it as a mapping with keys of: {', '.join(known)}" if known else "write it as 'key: value' lines"
            )
        elif kind == "string_type" and keys:
            hint = f"quote it: {keys[-1]}: '{_as_written(given)}'"
        elif kind in ("list_type", "tuple_type") and keys:
            hint = f"write a list: {keys[-1]}: [{_as_written(given)}]"
        return f"it is not {_TYPES[kind]}", f"the key takes {_TYPES[kind]}", hint
    if kind == "string_pattern_mismatch":
        pattern = str(context["pattern"])
        rule = _PATTERNS.get(pattern, f"the text matches {pattern}")
        return "the text has a form that this key does not take", rule, _spelling_hint(str(given), pattern)
    if kind in ("literal_error", "enum"):
        known = re.findall(r"'([^']+)'", str(context["expected"]))
        peer = PEER_VALUES.get(str(given).lower(), "")
        hint = f"use {peer!r}" if peer in known else did_you_mean(str(given), known)
        return "no such value", f"it is one of {', '.join(known) or context['expected']}", hint
    if kind.startswith(("greater_than", "less_than")):
        return "it is out of range", str(error["msg"]).replace("Input should be", "the value is"), ""
    message = str(error["msg"]).removeprefix("Value error, ")
    return message.replace("Input should be", "it should be").replace("String should", "it should"), "", ""


def _spelling_hint(given: str, pattern: str) -> str:
    """Return a hint with the nearest text that `pattern` takes: in lower case, with '-' for other characters."""
    near = re.sub(r"[^a-z0-9]+", "-", given.lower()).strip("-")
    taken = [text for text in (near, f"{near}@latest") if re.fullmatch(pattern, text)]
    return f"write {taken[0]!r}" if taken else ""


def _unknown_key(
    cls: type[BaseModel], error: Mapping[str, Any], keys: Sequence[str], tree: Mapping[str, Any]
) -> tuple[str, str, str, str]:
    dotted, name = ".".join(keys), keys[-1]
    models = _models_at(cls, keys[:-1])
    meant = [model for model in models if _kinds(model) & set(error["loc"])] or models
    known = _keys_of(meant)
    if name in _keys_of(models):
        hint = _key_of_another_kind(models, meant[0], keys, tree)
    else:
        *above, last = PEER_KEYS.get(name, "").split(".")
        peer = PEER_KEYS[name] if last in _keys_of(_models_at(cls, above)) else ""
        elsewhere = peer or next((path for path in _paths_to(cls, name) if path != dotted), "")
        hint = f"use {elsewhere!r}" if elsewhere else did_you_mean(name, known) or f"remove {name!r}"
        hint = _renamed_key(cls, name, known) or hint
    return (
        dotted,
        "unknown key" + ("" if isinstance(error["input"], Mapping | list) else f" (value {_short(error['input'])})"),
        f"known keys here: {', '.join(known)}",
        hint,
    )


def _key_of_another_kind(
    models: Sequence[type[BaseModel]], meant: type[BaseModel], keys: Sequence[str], tree: Mapping[str, Any]
) -> str:
    given: Any = tree
    for key in keys[:-1]:
        given = given[int(key)] if isinstance(given, list) else given[key]
    if _tag(meant) in given:
        tag = f"{{{_tag(meant)}: {min(_kinds(meant))}}}"
        return f"it is of another kind; replace all of them: --set '{'.'.join(keys[:-1])}={tag}'"
    having = sorted(kind for model in models if keys[-1] in model.model_fields for kind in _kinds(model))
    return f"{keys[-1]!r} belongs to {_tag(meant)} {' or '.join(having)}: add '{_tag(meant)}: {having[0]}'"


def _renamed_key(cls: type[BaseModel], name: str, known: Sequence[str]) -> str:
    new = RENAMED_KEYS.get(name)
    if new is None:
        return ""
    if new in known:
        return f"{name} was renamed to {new}"
    path = next(_paths_to(cls, new), "")
    return f"{name} was renamed to {new}: use {path!r}" if path else ""


def _paths_to(cls: type[BaseModel], name: str, prefix: str = "", depth: int = 3) -> Iterator[str]:
    """Yield the dotted keys of `cls` that end in `name`, shallow ones first."""
    if prefix and name in cls.model_fields:
        yield f"{prefix}.{name}"
    if depth:
        for key, field in cls.model_fields.items():
            for model in _models_in(field.annotation):
                yield from _paths_to(model, name, f"{prefix}.{key}" if prefix else key, depth - 1)


def _in_tree(tree: Any, loc: Sequence[Any], part: Any) -> bool:
    """Pydantic puts union tags into `loc`; keep only what the user wrote."""
    for step in loc:
        found = (isinstance(tree, Mapping) and step in tree) or (
            isinstance(tree, list) and isinstance(step, int) and step < len(tree)
        )
        if step is part:
            return found
        if found:
            tree = tree[step]
    return False


def _models_at(cls: type[BaseModel], path: Sequence[str]) -> list[type[BaseModel]]:
    """Return the models that may stand at a dotted key: several where it is a union."""
    models: list[type[BaseModel]] = [cls]
    for part in path:
        if part.isdigit():
            continue
        models = [
            m
            for model in models
            for name, field in model.model_fields.items()
            if name == part
            for m in _models_in(field.annotation)
        ]
    return models


def _keys_of(models: Sequence[type[BaseModel]]) -> list[str]:
    return sorted({name for model in models for name in model.model_fields})


def _tag(model: type[BaseModel]) -> str:
    """Return the key that selects one of several models."""
    return "kind" if "kind" in model.model_fields else "name"


def _kinds(model: type[BaseModel]) -> set[str]:
    """Return the values of its tag that select this model."""
    field = model.model_fields.get(_tag(model))
    return {value for value in get_args(field.annotation) if isinstance(value, str)} if field else set()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for arg in get_args(annotation):
        yield from _models_in(arg)


def _as_written(value: object) -> str:
    """Return the word that YAML 1.1 most likely read as `value`."""
    return (
        {True: "yes", False: "no", None: "null"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
