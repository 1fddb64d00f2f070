"""Sources of rows: files with weights, renamed columns, templates over columns, and the held-out share."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from graftwork.config import Spec
from graftwork.datasets.readers import read_records
from graftwork.errors import ConfigError, DataError

if TYPE_CHECKING:
    import jinja2

JSON_KEYS = frozenset(
    {
        "messages",
        "conversations",
        "tools",
        "functions",
        "history",
        "chat_template_kwargs",
        "gold",
        "given_fields",
        "input",
        "preferred_output",
        "non_preferred_output",
    }
)
"""Keys whose template gives JSON where its text begins with `[` or `{`; every other template gives text."""
_KEPT = frozenset({"id", "doc_id", "gold", "given_fields"})
"""Columns that stay in the row although `columns` or `template` reads them."""


class MixturePart(Spec):
    """One of several sources of training rows."""

    path: str
    """Rows, as `data.train` names them."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the rows, relative to the other weights: given for all sources or for none. With weights, the rows are
    as many as the shares allow without a row twice; each source gives its share of them, drawn by `seed`, and the rest
    of its rows is left out and reported. Without weights every row of every source is taken once."""


TrainSources = Annotated[
    Annotated[str, Tag("path")] | Annotated[tuple[MixturePart, ...], Tag("sources")],
    Discriminator(lambda given: "sources" if isinstance(given, list | tuple) else "path"),
]
"""One path, or several sources."""
EvalSource = Annotated[
    Annotated[str, Tag("path")] | Annotated[float, Field(gt=0, lt=1), Tag("share")],
    Discriminator(lambda given: "share" if isinstance(given, float | int) else "path"),
]
"""One path, or a share of the training rows."""


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows of one dataset of a run: where they are, and how each record is changed before it is read."""

    parts: tuple[MixturePart, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    """Key of a row -> the file's column."""
    template: Mapping[str, str] = field(default_factory=dict)
    """Key of a row -> Jinja text over the file's columns."""
    share: float | None = None
    """Share of the rows that is held out, by the hash of their content."""
    side: Literal["train", "eval"] = "train"
    """The side of `share` that is read."""
    seed: int = 0
    """Draws the rows of a weighted mixture."""

    @classmethod
    def of(cls, source: "str | RowSource") -> "RowSource":
        """The source itself, or the one of a URI."""
        return source if isinstance(source, RowSource) else cls((MixturePart(path=source),))

    def __str__(self) -> str:
        return ", ".join(part.path for part in self.parts)

    @property
    def weights(self) -> tuple[float, ...]:
        """Shares of the sources, which add up to 1; empty where every row is taken."""
        given = [part.weight for part in self.parts if part.weight is not None]
        return tuple(weight / sum(given) for weight in given)

    def holds_out(self, content: int) -> bool:
        """Return whether a row of that content hash (63 bits) is on the other side of the split."""
        return self.share is not None and (content < self.share * 2**63) != (self.side == "eval")

    def records(self, part: MixturePart) -> Iterator[tuple[int, dict[str, Any], str]]:
        """(row number, row with `columns` and `template` applied, its name in errors) of one file or folder."""
        shape = RowShape(self.columns, self.template) if self.columns or self.template else None
        for number, record in read_records(part.path):
            where = f"{part.path} row {number}"
            yield number, shape.apply(record, where) if shape else record, where


_PROMPTS = frozenset({"messages", "conversations", "instruction", "prompt", "text"})
"""Keys of which one holds what a row asks; where the spec makes one of them, the file's others are not read."""


class RowShape:
    """`data.columns` and `data.template`, compiled. Raises ConfigError for a template that is not Jinja."""

    def __init__(self, columns: Mapping[str, str], template: Mapping[str, str]) -> None:
        from jinja2 import meta

        environment = _environment()
        self.columns = columns
        self.templates = {key: compile_text(text, f"data.template.{key}") for key, text in template.items()}
        read = (meta.find_undeclared_variables(environment.parse(text)) for text in template.values())
        self._read = {*columns.values(), *(name for names in read for name in names)}

    def apply(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The row with its new keys; columns that were read go, others stay. Raises DataError."""
        made: dict[str, Any] = {}
        for key, column in self.columns.items():
            if column not in record:
                raise _no_column(where, f"data.columns.{key}={column}", f"no column {column!r}", record)
            made[key] = record[column]
        for key, template in self.templates.items():
            made[key] = self._render(key, template, record, where)
        rest = {key: value for key, value in record.items() if key not in self._read or key in _KEPT}
        hidden = {*made, *(_PROMPTS if _PROMPTS & made.keys() else ())}
        return {f"{key} (of the file)" if key in hidden else key: value for key, value in rest.items()} | made

    def _render(self, key: str, template: "jinja2.Template", record: Mapping[str, Any], where: str) -> Any:
        import jinja2

        try:
            text = template.render(record)
        except jinja2.UndefinedError as error:
            raise _no_column(where, f"data.template.{key}", str(error), record) from None
        except Exception as error:  # any error of an expression of the user's
            raise DataError(
                f"{where}: data.template.{key}", str(error), "a template gives a text for each row"
            ) from None
        if key not in JSON_KEYS or not text.lstrip().startswith(("[", "{")):
            return text
        try:
            return json.loads(text)
        except ValueError as error:
            rule, hint = f"the template of {key} gives JSON", "write values as {{ column | tojson }}"
            raise DataError(f"{where}: data.template.{key}", f"it is not JSON ({error})", rule, hint) from None


def compile_text(text: str, where: str) -> "jinja2.Template":
    """A sandboxed Jinja template. Raises ConfigError where it has a syntax error."""
    import jinja2

    try:
        return _environment().from_string(text)
    except jinja2.TemplateError as error:
        raise ConfigError(where, f"it is not valid Jinja ({error})", "columns are written as {{ column }}") from None


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def finalize(value: Any) -> Any:
        if value is None:
            raise jinja2.TemplateRuntimeError("a value is null: write {{ column or '' }}, or leave such rows out")
        return value

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=finalize
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment


def _no_column(where: str, key: str, problem: str, record: Mapping[str, Any]) -> DataError:
    return DataError(f"{where}: {key}", problem, f"columns of the row: {', '.join(record)}", "name one of them")
