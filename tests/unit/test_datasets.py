from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedmerge.errors import InputError
from fedmerge_client.train.datasets import label_ids, read_conversations, read_rows, read_texts

RECORDS = [{"text": "one two", "label": "a"}, {"text": 'say "three, four"\nfive', "label": "b"}]


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz"])
def test_json_lines_and_their_line_numbers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n\n".join(json.dumps(record) for record in RECORDS) + "\n")
    rows = read_rows(path)
    assert [(row.text, row.label, row.line) for row in rows] == [
        ("one two", "a", 1),
        ('say "three, four"\nfive', "b", 3),
    ]


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_csv_with_quotes_other_columns_and_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    content = '\ufeffid,text,label\r\n1,one two,a\r\n2,"say ""three, four""\nfive",b\r\n'
    rows = read_rows(write(tmp_path / name, content))
    assert [(row.text, row.label) for row in rows] == [(record["text"], record["label"]) for record in RECORDS]


def test_columns_can_be_named_and_labels_may_be_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"body": "x y", "class": 3}\n{"body": "z", "class": false}\n')
    rows = read_rows(path, text_column="body", label_column="class")
    assert [(row.text, row.label) for row in rows] == [("x y", "3"), ("z", "false")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", '{"body": "one"}\n{"body": "two", "label": "a"}\n', ["one", "two"]),
        ("x.csv.gz", 'id,body\n1,one\n2,"t\nwo"\n', ["one", "t\nwo"]),
        ("x.txt", "one\ntwo\n\nthree\n", ["one\ntwo\n\nthree\n"]),
        ("x.TXT.gz", "\ufeffeins, zw\u00f6lf", ["eins, zw\u00f6lf"]),
    ],
)
def test_texts_without_labels(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    assert read_texts(write(tmp_path / name, content), text_column="body") == expected


def test_labels_are_not_looked_for_in_plain_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.txt: don't know how to read"):
        read_rows(write(tmp_path / "rows.txt", "one"))
    with pytest.raises(InputError, match=r"rows\.txt:1: column 'text' is empty"):
        read_texts(write(tmp_path / "rows.txt", " \n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "x", "label": "a"}\n{"text": \n', r"rows\.jsonl:2: not JSON"),
        ("rows.jsonl", '["x", "a"]\n', r"rows\.jsonl:1: not a JSON object"),
        ("rows.jsonl", '{"body": "x", "label": "a"}\n', r"rows\.jsonl:1: no column 'text'; there are 'body', 'label'"),
        ("rows.jsonl", '{"text": " ", "label": "a"}\n', r"rows\.jsonl:1: column 'text' is empty"),
        ("rows.jsonl", '{"text": "x", "label": null}\n', r"rows\.jsonl:1: column 'label' is empty"),
        ("rows.jsonl", "\n", "no rows"),
        ("rows.jsonl", "[" * 100_000, r"rows\.jsonl:1: not JSON"),
        ("rows.csv", "text,label\n", "no rows"),
        ("rows.csv", "", "no rows"),
        ("rows.csv", "text,label\nx,a\ny\n", r"rows\.csv:3: column 'label' is empty"),
        ("rows.csv", "text,label\nx,a,b\n", r"rows\.csv:2: more fields"),
        ("rows.csv", "text,kind\nx,a\n", r"rows\.csv:2: no column 'label'; there are 'text', 'kind'"),
        ("rows.csv", 'text,label\n"x"y,a\n', r"rows\.csv:2: not CSV"),
        ("rows.parquet", "PAR1", "can't be read as Parquet"),
        ("rows.feather", "x", "don't know how to read"),
    ],
)
def test_mistakes_are_reported_with_file_and_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rows(write(tmp_path / name, content))


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read as text"):
        read_rows(tmp_path / "binary.jsonl")
    whole = gzip.compress(b'{"text": "x", "label": "a"}\n' * 100)
    for broken in (whole[:-12], b"plain", whole[:20] + b"\xff" * 20):
        (tmp_path / "broken.jsonl.gz").write_bytes(broken)
        with pytest.raises(InputError, match="can't be read as text"):
            read_rows(tmp_path / "broken.jsonl.gz")


def test_labels_become_the_models_class_indices(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "x", "label": "spam"}\n{"text": "y", "label": "han"}\n')
    rows = read_rows(path)
    assert label_ids(path, rows, {"ham": 0, "spam": 1, "han": 2}) == [1, 2]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the model has no label 'han'; did you mean 'ham'") as caught:
        label_ids(path, rows, {"ham": 0, "spam": 1})
    assert "ham, spam" in (caught.value.hint or "")


def test_parquet_has_rows_for_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = [f"text {number}" for number in range(7)]
    table = pa.table({"text": texts, "label": list(range(7)), "more": [None] * 7})
    parquet.write_table(table, path, row_group_size=3)
    rows = read_rows(path)
    assert [(row.text, row.label, row.line) for row in rows] == [
        (text, str(number), number + 1) for number, text in enumerate(texts)
    ]
    assert read_texts(path) == texts
    with pytest.raises(InputError, match=r"rows\.parquet:1: no column 'body'; there are 'text', 'label', 'more'"):
        read_texts(path, text_column="body")
    with pytest.raises(InputError, match=r"rows\.parquet:1: column 'more' is empty"):
        read_texts(path, text_column="more")
    parquet.write_table(table.slice(0, 0), path)
    with pytest.raises(InputError, match="no rows"):
        read_texts(path)


def test_conversations_from_json_lines_and_parquet(tmp_path: Path) -> None:
    said = [
        [{"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "hello"}],
        [{"role": role, "content": text} for role, text in (("system", ""), ("user", "a"), ("assistant", "b"))],
    ]
    lines = write(tmp_path / "said.jsonl", "\n\n".join(json.dumps({"messages": one, "id": 3}) for one in said))
    found = read_conversations(lines)
    assert [conversation.line for conversation in found] == [1, 3]
    assert found[0].messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    parquet.write_table(pa.table({"talk": said}), tmp_path / "said.parquet")
    again = read_conversations(tmp_path / "said.parquet", messages_column="talk")
    assert [conversation.messages for conversation in again] == [conversation.messages for conversation in found]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "column 'messages' is not a list of messages"),
        ([], "column 'messages' is not a list of messages"),
        (["hi"], "message 1 has no role and content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "message 2 has no role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has no role and content"),
        ([{"role": "tool", "content": "a"}], "message 1 is of role 'tool'"),
        ([{"role": "user", "content": "a"}], "needs a reply"),
        ([{"role": "assistant", "content": "a"}], "needs a reply"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, messages: object, message: str) -> None:
    path = write(tmp_path / "said.jsonl", "\n" + json.dumps({"messages": messages}))
    with pytest.raises(InputError, match=rf"said\.jsonl:2: {message}"):
        read_conversations(path)
    with pytest.raises(InputError, match=r"said\.jsonl:2: no column 'talk'; there are 'messages'"):
        read_conversations(path, messages_column="talk")
