"""Which tokens stand before prefix, suffix and middle: the base's own, reserved ones that are named, or added rows."""

from dataclasses import dataclass

from graftwork.chat import Template
from graftwork.errors import ConfigError
from graftwork.training.text_spec import SentinelSpec

FAMILIES = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SantaCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder  # noqa: RUF001
)
"""(prefix, suffix, middle) of tokenizers whose bases learned to infill."""


@dataclass(frozen=True)
class Sentinels:
    """Ids of the three tokens. `train` where the base has not learned them: their rows are trained with the adapter."""

    prefix: int
    suffix: int
    middle: int
    train: bool
    names: str
    """For people."""

    @property
    def ids(self) -> tuple[int, int, int]:
        """In the order prefix, suffix, middle."""
        return self.prefix, self.suffix, self.middle


def sentinels_of(spec: SentinelSpec, template: Template, rows: int) -> Sentinels:
    """The tokens that the spec means, on a base whose embedding has `rows` rows. Raises ConfigError."""
    if spec.names is not None:
        return _named(spec.names, template)
    own = next((family for family in FAMILIES if all(name in template.specials for name in family)), None)
    if own is not None and spec.tokens != "add":
        return _known(own, template, train=False)
    spare = rows - template.vocab_size
    if spec.tokens != "existing" and spare >= 3:
        first = template.vocab_size
        return Sentinels(first, first + 1, first + 2, train=True, names=f"rows {first} to {first + 2}")
    reserved = ", ".join(name for name, number in template.specials.items() if number not in template.stop_ids)
    raise ConfigError(
        f"objective.sentinels.tokens={spec.tokens}",
        f"the tokenizer has no infilling tokens and the embedding {spare} rows beyond it",
        "sentinels are the tokenizer's own, three reserved tokens that are named, or three rows beyond the tokenizer",
        f"set base.extra_tokens=3, or name sentinels.prefix, suffix and middle: three that nothing uses of {reserved}",
    )


def _named(names: tuple[str, str, str], template: Template) -> Sentinels:
    unknown = [name for name in names if name not in template.specials]
    if unknown:
        raise ConfigError(f"objective.sentinels: {unknown[0]!r}", "the tokenizer has no such special token",
                          f"its special tokens: {', '.join(template.specials)}", "name three of them")  # fmt: skip
    taken = [name for name in names if template.specials[name] in template.stop_ids]
    if taken:
        raise ConfigError(f"objective.sentinels: {taken[0]!r}", "it ends an answer",
                          "a sentinel means nothing else yet", "name a reserved token")  # fmt: skip
    return _known(names, template, train=names not in FAMILIES)


def _known(names: tuple[str, str, str], template: Template, *, train: bool) -> Sentinels:
    prefix, suffix, middle = (template.specials[name] for name in names)
    return Sentinels(prefix, suffix, middle, train, " ".join(names))
