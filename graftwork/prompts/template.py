"""A base's chat template and tokenizer, loaded so that text from people can never become a control token.

How that is kept: every special token of `tokenizer.json` gets a random name in this process ("sealed"). What the
template itself writes is renamed along; what stands in a message is not, so to the tokenizer it is plain text.
"""

import copy
import functools
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from graftwork.errors import BaseModelError, DataError

if TYPE_CHECKING:
    import jinja2

Turn = tuple[str, str]
"""(role, content)."""
DEFAULT_DATE = date(2024, 7, 26)
"""Today's date in a template unless a spec or a manifest names another: the fallback of Llama 3's own."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Turns on which the prefix property is checked. Reasoning tags, because templates like to cut them from earlier turns.
_PROBE: tuple[Turn, ...] = (
    ("user", "first question"),
    ("assistant", "<think>\nbecause\n</think>\n\nfirst answer"),
    ("user", "second question"),
    ("assistant", "<think>\nsince\n</think>\n\nsecond answer"),
    ("user", "third question"),
    ("assistant", "third answer"),
)


class Template:
    """Chat template and tokenizer of one base. Thread-safe; loads in about half a second."""

    def __init__(
        self,
        source: str,
        tokenizer_json: str,
        named: Mapping[str, str],
        eos_ids: Iterable[int],
        day: date = DEFAULT_DATE,
    ) -> None:
        from tokenizers import Tokenizer

        self.date = day if "strftime_now" in source else None
        """The day that the template writes as today's; None: it writes none."""
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        """sha256 of the template text."""
        self.tokenizer_digest = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        """sha256 of tokenizer.json."""
        self._named = dict(named)
        self._jinja = compile_template(source)
        model = json.loads(tokenizer_json)
        specials = [t["content"] for t in model["added_tokens"] if t["special"] and len(t["content"]) > 1]
        salt = secrets.token_hex(8)
        self._mark = f"<{salt}>"
        self._sealed = {name: f"<{salt}{number:04d}>" for number, name in enumerate(specials)}
        self._names = {sealed: name for name, sealed in self._sealed.items()}
        self._special = _any_of(specials)
        self._special_start = re.compile(f"(?={self._special.pattern})(.)", re.DOTALL)
        self._sealed_special = _any_of(self._names)
        self._tokenizer = Tokenizer.from_str(json.dumps(_rename_specials(model, self._sealed)))
        self.specials: Mapping[str, int] = {t["content"]: t["id"] for t in model["added_tokens"] if t["special"]}
        """Control tokens by name."""
        self.special_ids = frozenset(self.specials.values())
        """Control tokens: no text of people is ever one."""
        self.opening_ids = _opening_ids(model.get("post_processor"), self.specials)
        """Ids that the tokenizer puts before every plain text: the beginning-of-text token, or none."""
        self.eos_names = [self._named["eos_token"]] if "eos_token" in self._named else []
        """The base's end token by name, where it has one."""
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        """Tokenizer ids lie in [0, vocab_size)."""
        self.longest_token_bytes = _longest_token_bytes(model)
        """UTF-8 bytes of text that one token holds at most."""
        end_id = self._end_of_turn()
        self.stop_ids = frozenset({end_id, *eos_ids})
        """Tokens that end an answer."""
        self.pad_id: int = self.specials.get(self._named.get("pad_token", ""), end_id)
        """Filler of a batch; never looked at."""
        self.has_prefix_property = self._has_prefix_property()
        """Each prompt is a text prefix of the conversation that it grows into. If not, train one turn a row."""

    @classmethod
    def load(cls, folder: Path, day: date = DEFAULT_DATE) -> "Template":
        """From a folder with tokenizer.json and a chat template, on the given day. Raises BaseModelError."""
        try:
            tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
            named, eos_names = _named_tokens(folder)
            source = _template_source(folder)
            added = {t["content"]: t["id"] for t in json.loads(tokenizer_json)["added_tokens"]}
            eos_ids = {added[name] for name in eos_names if name in added}
            ended = _json(folder / "generation_config.json").get("eos_token_id")
            eos_ids.update(ended if isinstance(ended, list) else [ended] if isinstance(ended, int) else [])
            return cls(source, tokenizer_json, named, eos_ids, day)
        except FileNotFoundError as error:
            raise BaseModelError(
                f"tokenizer of {folder}",
                f"no {Path(error.filename).name}",
                "a base has tokenizer.json and a chat template next to its weights",
                "export the tokenizer in the fast (tokenizers) format, for example with save_pretrained",
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BaseModelError(f"tokenizer of {folder}", f"it cannot be read ({error})") from error
        except DataError as error:
            raise BaseModelError(
                f"chat template of {folder}", error.problem, "question and answer must be allowed"
            ) from error

    def on(self, day: date | None) -> Self:
        """Return this template with another day; itself where it writes no date, or where `day` is None or its own."""
        if self.date is None or day is None or day == self.date:
            return self
        dated = copy.copy(self)
        dated.date = day
        return dated

    def sealed_text(self, turns: Sequence[Turn], *, generate: bool) -> str:
        """The template's text with special tokens sealed. Raises DataError where the template refuses the turns."""
        import jinja2

        # a mark behind the first character of each special token in a message breaks it, overlapping ones too
        shield = partial(self._special_start.sub, lambda match: match.group(1) + self._mark)
        messages = [{"role": role, "content": shield(content)} for role, content in turns]
        try:
            text = self._jinja.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generate,
                strftime_now=(self.date or DEFAULT_DATE).strftime,
                **self._named,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(role for role, _ in turns)
            raise DataError(
                f"conversation of turns {roles}",
                f"the base's chat template refuses it ({error})",
                "the template of the base decides which turns may follow each other",
            ) from error
        return self._special.sub(lambda m: self._sealed[m.group()], text).replace(self._mark, "")

    def sealed_ids(self, sealed: str) -> list[int]:
        """Ids of sealed text: special tokens are the template's own, none comes from a message."""
        # `encode` holds the GIL to its end (2.9 s for 3.9 MB, tokenizers 0.23); the batch calls release it
        ids: list[int] = self._tokenizer.encode_batch_fast([sealed], add_special_tokens=False)[0].ids
        return ids

    def continuation_ids(self, sealed: str) -> list[int]:
        """Ids of text that goes on after other text: no beginning-of-text space is put before it."""
        first = next(iter(self._names))
        return self.sealed_ids(first + sealed)[1:]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token can come out."""
        return self.sealed_ids(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; an id outside the tokenizer's vocabulary gives nothing."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text if skip_special else self._sealed_special.sub(lambda match: self._names[match.group()], text)

    def sealed_tokenizer(self) -> str:
        """tokenizer.json as it is used here, special tokens sealed: for libraries that read the vocabulary."""
        text: str = self._tokenizer.to_str()
        return text

    def _end_of_turn(self) -> int:
        """The first special token behind an answer."""
        prompt = self.sealed_text(_PROBE[:1], generate=True)
        answer = "plain answer"
        whole = self.sealed_text([*_PROBE[:1], ("assistant", answer)], generate=False)
        rest = whole[whole.rfind(answer) + len(answer) :] if answer in whole[len(prompt) :] else ""
        for token in self.continuation_ids(rest) if rest and self._names else ():
            if token in self.special_ids:
                return token
        raise BaseModelError(
            "chat template of the base",
            f"it ends an answer with {rest!r}",
            "an answer ends with a special token, or generation could not stop",
            "use a base whose chat template closes the assistant's turn",
        )

    def _has_prefix_property(self) -> bool:
        for opening in ((), (("system", "be brief"),)):
            turns = (*opening, *_PROBE)
            try:
                whole = self.sealed_text(turns, generate=False)
                for end in range(1, len(turns) + 1):
                    is_prompt = turns[end - 1][0] == "user"
                    if turns[end - 1][0] != "system" and not whole.startswith(
                        self.sealed_text(turns[:end], generate=is_prompt)
                    ):
                        return False
            except DataError:
                if not opening:
                    raise
        return True


def compile_template(source: str) -> "jinja2.Template":
    """The sandboxed jinja of transformers' `apply_chat_template` (5.23: utils/chat_template_utils.py)."""
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise BaseModelError("chat template of the base", f"it is not valid jinja ({error})") from error


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks answers for transformers' own masks; here its body is just rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _opening_ids(processor: Any, specials: Mapping[str, int]) -> tuple[int, ...]:
    """From the `post_processor` of tokenizer.json: special tokens before the text of a single sequence."""
    if not isinstance(processor, dict):
        return ()
    if processor.get("type") == "Sequence":
        found = (_opening_ids(part, specials) for part in processor["processors"])
        return next((ids for ids in found if ids), ())
    if processor.get("type") != "TemplateProcessing":
        return ()
    before = itertools.takewhile(lambda part: "SpecialToken" in part, processor["single"])
    return tuple(specials[part["SpecialToken"]["id"]] for part in before)


def _longest_token_bytes(model: Mapping[str, Any]) -> int:
    """From tokenizer.json. The pieces of a byte-level vocabulary have one character a byte."""
    vocab = model["model"]["vocab"]
    pieces = [piece if isinstance(piece, str) else piece[0] for piece in vocab]
    byte_level = '"ByteLevel"' in json.dumps(model.get("decoder"))
    sizes = (len(piece) if byte_level else len(piece.encode()) for piece in pieces)
    return max(itertools.chain(sizes, (len(token["content"].encode()) for token in model["added_tokens"])))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _rename_specials(model: dict[str, Any], sealed: Mapping[str, str]) -> dict[str, Any]:
    """`tokenizer.json` with special tokens renamed, everything else (ids, flags, order) untouched."""
    added = [{**t, "content": sealed.get(t["content"], t["content"])} for t in model["added_tokens"]]
    inner = dict(model["model"])
    vocab = inner["vocab"]
    if isinstance(vocab, dict):
        inner["vocab"] = {sealed.get(piece, piece): number for piece, number in vocab.items()}
    else:  # Unigram: [piece, score]
        inner["vocab"] = [[sealed.get(piece, piece), score] for piece, score in vocab]
    if isinstance(inner.get("unk_token"), str):
        inner["unk_token"] = sealed.get(inner["unk_token"], inner["unk_token"])
    return {**model, "added_tokens": added, "model": inner, "post_processor": None, "truncation": None, "padding": None}


def _template_source(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}.get("default")
    if not isinstance(found, str):
        raise BaseModelError(
            f"chat template of {folder}",
            "there is none",
            "the base's own template turns a conversation into text",
            "take the instruct version of the base, or add a chat_template.jinja next to its weights",
        )
    return found


def _named_tokens(folder: Path) -> tuple[dict[str, str], list[str]]:
    """(what the template knows as bos_token, eos_token, ..., the names of the end tokens)."""
    settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    named = {}
    for key in _NAMED_TOKENS:
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[key] = value
    return named, [named["eos_token"]] if "eos_token" in named else []


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
