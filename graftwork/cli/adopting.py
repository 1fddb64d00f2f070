"""`graftwork adapters publish`: an adapter that was trained elsewhere becomes a version of a task."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.options import Alias, JsonFlag, Root
from graftwork.cli.output import echo, print_json
from graftwork.storage import DEFAULT_ROOT, Store


def publish(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder with adapter_config.json and adapter_model.safetensors.")
    ],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task to publish it under.")],
    base: Annotated[str, typer.Option("--base", metavar="URI", help="Base that the adapter was trained on.")],
    alias: Alias = "latest",
    system: Annotated[
        str | None, typer.Option("--system", help="System prompt that the adapter was trained with.")
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Round the LoRA weights to bfloat16. Halves the size; makes a different version."),
    ] = False,
    root: Root = DEFAULT_ROOT,
    as_json: JsonFlag = False,
) -> None:
    """Publish a PEFT adapter folder, so that endpoints on the same base can serve it."""
    from graftwork import artifact, base_model, provenance
    from graftwork.base_model import BaseSpec
    from graftwork.chat import PromptSpec
    from graftwork.serving.engine.adapters.config_file import ConfigFile

    resolved = base_model.resolve(BaseSpec(uri=base))
    template = base_model.template(resolved)
    config = ConfigFile.read(folder).values
    with tempfile.TemporaryDirectory(prefix="gw-publish-") as name:
        made = artifact.publish(
            Store(root), task, _rounded(folder, Path(name)) if bf16 else folder, base_digest=resolved.digest,
            quant={"kind": "none"}, template_digest=template.digest, tokenizer_digest=template.tokenizer_digest,
            template_date=template.date,
            method={"kind": str(config.get("peft_type", "unknown")).lower(), "rank": config.get("r")},
            prompt=PromptSpec(system=system).model_dump(mode="json"), data_fingerprint="unknown", metrics={},
            run="published by hand", provenance=provenance.collect(0), alias=alias,
        )  # fmt: skip
    if as_json:
        return print_json(made.model_dump(mode="json"))
    echo(f"published {made.ref}, alias {task}@{alias}")


def _rounded(folder: Path, into: Path) -> Path:
    """The folder's files, LoRA halves in bf16."""
    import torch
    from safetensors.torch import save_file

    from graftwork.artifact_check import CONFIG_FILE, WEIGHTS_FILE
    from graftwork.serving.engine.adapter_bytes import read_tensors

    halves = (".lora_A.weight", ".lora_B.weight")
    found = read_tensors(folder / WEIGHTS_FILE)
    rounded = {key: value.to(torch.bfloat16) if key.endswith(halves) else value for key, value in found.items()}
    save_file({key: value.contiguous() for key, value in rounded.items()}, into / WEIGHTS_FILE, {"format": "pt"})
    (into / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    return into
