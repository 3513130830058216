from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedmerge.errors import InputError, MissingExtra
from fedmerge_client.docstrings import LIBRARIES, Library, build_corpus, prose_sentences

SMALL = {
    "python": Library("", {"email": "email", "logging": "logging"}),
    "tools": Library("", {"unittest": "unittest", "http": "http"}),
}


def read(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["text"], row["label"]) for row in rows]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the mean of all the values.\n\nParameters\n----------\nx : array\n", 1),
        ("Return the mean of all\n    the values. Weights may be given for each of them.", 2),
        ("Send a message to the server.\n\n>>> send('Hello to all of the world out there.')", 1),
        ("Send a message to the server.\n:param message: Text of the message to send there.", 1),
        (".. note:: This is about the function and nothing else.", 0),
        ("x -> y for every value of x there is.", 0),
        ("Do nothing.", 0),
        ("lower case starts are mostly fragments of something.", 0),
        ("", 0),
    ],
)
def test_sentences_are_prose_from_the_introduction(docstring: str, expected: int) -> None:
    found = prose_sentences(docstring)
    assert len(found) == expected
    assert not any(mark in text for text in found for mark in (">>>", "\n", "  ", "Parameters", ":param"))


def test_markup_is_taken_off() -> None:
    (text,) = prose_sentences(":class:`~torch.optim.SGD` for the ``params`` of *any* numpy.ndarray shape.")
    assert text == "SGD for the params of any ndarray shape."


def test_corpus_is_disjoint_labelled_by_organisation_and_repeats(tmp_path: Path) -> None:
    first = build_corpus(tmp_path / "first", libraries=SMALL, num_train=30, num_test=5)
    again = build_corpus(tmp_path / "again", libraries=SMALL, num_train=30, num_test=5)
    other = build_corpus(tmp_path / "other", libraries=SMALL, num_train=30, num_test=5, seed=1)
    assert first.labels == ("email", "logging", "unittest", "http")
    texts: list[str] = []
    for organisation, library in SMALL.items():
        train, test = read(first.train[organisation]), read(first.test[organisation])
        assert first.train[organisation].read_bytes() == again.train[organisation].read_bytes()
        assert first.test[organisation].read_bytes() == again.test[organisation].read_bytes()
        assert first.test[organisation].read_bytes() != other.test[organisation].read_bytes()
        for label in library.modules:
            assert [row[1] for row in test].count(label) == 5
            assert 20 <= [row[1] for row in train].count(label) <= 30
        assert {row[1] for row in train} == set(library.modules)
        texts += [text.lower() for text, _ in train + test]
    assert len(texts) == len(set(texts))
    assert not any(word in text for text in texts for word in ("python", "torch", "scipy", "sklearn"))


def test_nothing_is_imported_or_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "site" / "loudpackage"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    functions = [
        f'def f{i}():\n    r"""Return the value of column number {i} as text."""\n    print("\\d")\n' for i in range(9)
    ]
    (package / "inner" / "code.py").write_text("import nothing_of_the_kind\n" + "".join(functions))
    (package / "inner" / "template.py").write_text("def {{ name }}(): pass\n")
    (package / "inner" / "tests").mkdir()
    (package / "inner" / "tests" / "test_code.py").write_text(
        'def g():\n    """Check that the test is left out of it."""\n'
    )
    sys.path.insert(0, str(tmp_path / "site"))
    try:
        libraries = {"loud": Library("loudpackage", {"loud": "inner"})}
        corpus = build_corpus(tmp_path / "out", libraries=libraries, num_train=20, num_test=4)
    finally:
        sys.path.remove(str(tmp_path / "site"))
    rows = read(corpus.train["loud"]) + read(corpus.test["loud"])
    assert sorted(text for text, _ in rows) == [f"Return the value of column number {i} as text." for i in range(9)]
    assert "loudpackage" not in sys.modules
    assert capfd.readouterr() == ("", "")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match="reads the sources of no_such_library"):
        build_corpus(tmp_path, libraries={"x": Library("no_such_library", {"a": "a"})})
    with pytest.raises(InputError, match="the sources of a hold 0 usable sentences"):
        build_corpus(tmp_path, libraries={"x": Library("", {"a": "no_such_module"})})


@pytest.mark.slow
def test_the_demos_own_corpus(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the demo's libraries are not all installed: pip install 'fedmerge[demo]'")
    corpus = build_corpus(tmp_path)
    assert len(corpus.labels) == sum(len(library.modules) for library in LIBRARIES.values()) == 32
    for organisation, path in corpus.train.items():
        assert len(read(path)) > 500
        assert len(read(corpus.test[organisation])) == 8 * 12
