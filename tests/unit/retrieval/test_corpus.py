"""Documents become passages: by structure, overlapping, with nothing lost; what can't be read is said."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.errors import DataError
from graftwork.prompts.render import Passage
from graftwork.retrieval.corpus import Block, ChunkSpec, SourceSpec, blocks_of, document_of, passages_of, read_corpus

MARKDOWN = b"""# Guide

Welcome.

## Install ##
Run pip.
Then wait.

```sh
# no heading

pip install x
```
## Empty
# Other
Bye.
"""
HTML = b"""<!doctype html><html><head><title>T</title><style>p {}</style></head><body><h1>Guide <em>one</em></h1>
<p>Caf&eacute; is <b>op</b>en.<br>Daily.</p><script>if (a < b) x()</script><ul><li>tea<li>milk</ul>
<h2>Prices</h2><table><tr><td>1<td>2</table></body>"""


def test_markdown_keeps_headings_paragraphs_and_code() -> None:
    assert blocks_of("g.md", MARKDOWN) == [
        Block(1, "Guide"),
        Block(0, "Welcome."),
        Block(2, "Install"),
        Block(0, "Run pip.\nThen wait."),
        Block(0, "```sh\n# no heading\n\npip install x\n```"),
        Block(2, "Empty"),
        Block(1, "Other"),
        Block(0, "Bye."),
    ]
    assert [passage.text for passage in passages_of("g.md", blocks_of("g.md", MARKDOWN), ChunkSpec())] == [
        "Guide\nWelcome.",
        "Guide > Install\nRun pip.\nThen wait.\n```sh\n# no heading\n\npip install x\n```",
        "Guide\nEmpty",
        "Other\nBye.",
    ]


def test_html_is_what_a_browser_shows() -> None:
    assert blocks_of("g.HTML", HTML) == [
        Block(1, "Guide one"),
        Block(0, "Café is open."),
        Block(0, "Daily."),
        Block(0, "tea"),
        Block(0, "milk"),
        Block(2, "Prices"),
        Block(0, "1"),
        Block(0, "2"),
    ]


WORD = st.text("abcdefgh", min_size=1, max_size=90)
PARAGRAPH = st.lists(WORD | st.just("end."), min_size=1, max_size=40).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(PARAGRAPH, min_size=1, max_size=6), st.integers(50, 200), st.integers(0, 25))
def test_no_text_is_lost_and_no_passage_is_longer_than_it_may_be(
    paragraphs: list[str], max_chars: int, overlap: int
) -> None:
    number = itertools.count()  # no word stands twice, so that what two passages share can be told
    paragraphs = [" ".join(f"{word[:-1]}{next(number)}{word[-1]}" for word in text.split()) for text in paragraphs]
    spec = ChunkSpec(max_chars=max_chars, overlap_chars=overlap)
    blocks = [Block(1, "Top"), *(Block(0, text) for text in paragraphs)]
    bodies = [passage.text.removeprefix("Top\n") for passage in passages_of("d", blocks, spec)]
    assert all(len(body) <= max_chars for body in bodies)
    whole, read = "".join("".join(paragraphs).split()), ""
    for body in ("".join(body.split()) for body in bodies):
        shared = next(n for n in range(min(overlap, len(body)), -1, -1) if read.endswith(body[:n]))
        longest_true = next((n for n in range(shared, -1, -1) if whole.startswith(read + body[n:])), None)
        assert longest_true is not None, (read, body)
        read += body[longest_true:]
    assert read == whole


def test_a_passage_begins_with_the_end_of_the_one_before() -> None:
    text = "First things come first. Then comes the second. The third is last of all."
    spec = ChunkSpec(max_chars=50, overlap_chars=24)
    assert [p.text for p in passages_of("d", [Block(0, text)], spec)] == [
        "First things come first.\nThen comes the second.",
        "Then comes the second.\nThe third is last of all.",
    ]
    assert (document_of("a/b.md#12"), document_of("C#"), document_of("x#y")) == ("a/b.md", "C#", "x#y")


def test_a_folder_gives_all_its_documents_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {
        "b.md": "# B\nbee",
        "sub/a.txt": "ay",
        "z.png": "",
        ".hidden.md": "no",
        "c.html": "<p>sea",
    }.items():
        (tmp_path / name).write_text(text)
    found = read_corpus([SourceSpec(uri=str(tmp_path))], ChunkSpec())
    assert found == [Passage("b.md#1", "B\nbee"), Passage("c.html#1", "sea"), Passage("sub/a.txt#1", "ay")]


def test_the_same_rows_come_out_of_every_kind_of_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"key": 1, "head": "One", "body": 'a, "quoted"\nline'}, {"key": 2, "head": "Two", "body": None}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.csv").write_text('key,head,body\n1,One,"a, ""quoted""\nline"\n2,Two,\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    wanted = [Passage("1", 'One\na, "quoted"\nline'), Passage("2", "Two")]
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        source = SourceSpec.model_validate({"uri": str(tmp_path / name), "id": "key", "text": ["head", "body"]})
        assert read_corpus([source], ChunkSpec()) == wanted
    long = SourceSpec.model_validate({"uri": str(tmp_path / "t.csv"), "id": "key", "text": "head", "chunk": True})
    assert [passage.id for passage in read_corpus([long], ChunkSpec())] == ["1#1", "2#1"]


def write_pdf(path: Path, pages: list[str]) -> None:
    """Pages of one line each, written out by hand: PDF 1.4, one built-in font."""
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", font]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents {len(objects)} 0 R "
        objects.append(page.encode() + b"/Resources << /Font << /F1 3 0 R >> >> >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    path.write_bytes(out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + tail)


def test_a_pdf_is_cited_by_its_pages(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    write_pdf(tmp_path / "p.pdf", ["Runways are long", "", "Ports are wide"])
    found = read_corpus([SourceSpec(uri=str(tmp_path / "p.pdf"))], ChunkSpec())
    assert [passage.text for passage in found] == ["page 1\nRunways are long", "page 3\nPorts are wide"]
    write_pdf(tmp_path / "scan.pdf", ["", ""])
    with pytest.raises(DataError, match="2 pages hold no text"):
        read_corpus([SourceSpec(uri=str(tmp_path / "scan.pdf"))], ChunkSpec())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "id,body\n1,x\n", "row 1: text: no such column"),
        ("t.csv", "id,text\n1,x\n1,y\n", "row 2: id='1': row 1 has the same id"),
        ("t.csv", "id,text\n1,x,y\n", "row 1: it has not the 2 fields"),
        ("t.csv", 'id,text\n1,"x\n', "it is not CSV"),
        ("t.csv", "id,text\n1, \n", "row 1: text: it is empty"),
        ("t.csv", "id,text\n", "it has no rows"),
        ("t.jsonl", "", "it has no rows"),
        ("t.parquet", "PAR1 half", "it is not Parquet"),
        ("t.pdf", "%PDF-1.4 half a file", "t.pdf: (it cannot be read|pypdf is not installed)"),
        ("t.md", b"caf\xe9", "t.md line 1: it is not UTF-8"),
        ("t.txt", " \n", "no text was found"),
        ("t.docx", "x", "no such file or folder|is no"),
        ("nothing", None, "no such file or folder"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: str | bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        read_corpus([SourceSpec(uri=str(path))], ChunkSpec())


def test_one_id_from_two_sources_is_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("id,text\n7,x\n")
    with pytest.raises(DataError, match=r"passage id '7': it came before, from .*a\.csv"):
        read_corpus([SourceSpec(uri=str(tmp_path / name)) for name in ("a.csv", "b.csv")], ChunkSpec())
