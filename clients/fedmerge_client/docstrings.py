"""The demo's data: four organisations that document different software, read from packages that are installed anyway.

Text is the first sentence of a public class's, function's or method's docstring; its label is the part of the
software that it belongs to (`scipy.stats`, `torch.optim`, `email`). It is natural language from several fields, split
between organisations as it is in life: each sees its own labels only. The sources are parsed, never imported, so
nothing of these packages runs; and no text is stored here, it is whatever versions are installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmerge.errors import InputError, MissingExtra
from fedmerge.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Library:
    """Where an organisation's texts come from: `package` ("" is the standard library) and its modules, by label."""

    package: str
    modules: Mapping[str, str]


def _library(package: str, *modules: str) -> Library:
    """Label each module with its dotted name, as in an import statement, but for `package`'s own sub-packages."""
    return Library(package, {f"{package}.{module}".lstrip("."): module for module in modules})


LIBRARIES: dict[str, Library] = {
    "scipy": _library(
        "scipy", "stats", "signal", "optimize", "sparse", "interpolate", "special", "integrate", "spatial"
    ),
    "scikit-learn": _library(
        "sklearn",
        *("cluster", "linear_model", "ensemble", "metrics"),
        *("decomposition", "preprocessing", "model_selection", "datasets"),
    ),
    "torch": _library("torch", "nn", "optim", "distributions", "autograd", "cuda", "onnx", "fx", "utils.data"),
    "python": _library("", "asyncio", "email", "logging", "multiprocessing", "xml", "unittest", "http", "tarfile"),
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """What `build_corpus` wrote.

    `labels` holds every organisation's labels, in the order of `LIBRARIES`; `train` and `test` are JSON Lines files
    by organisation, with one `{"text": ..., "label": ...}` per line.
    """

    labels: tuple[str, ...]
    train: dict[str, Path]
    test: dict[str, Path]


def build_corpus(
    out_dir: Path,
    *,
    libraries: Mapping[str, Library] = LIBRARIES,
    num_train: int = 138,
    num_test: int = 12,
    seed: int = 0,
) -> Corpus:
    """Write `out_dir/<organisation>/{train,test}.jsonl` and return where they lie.

    Each label gets `num_test` test sentences and at most `num_train` others for training, drawn by `seed`. A sentence
    that occurs under two labels is left out, so nothing is in two files; the same installed packages give the same
    bytes. Raises `MissingExtra` when a package is not installed and `InputError` when a module has too few sentences.
    """
    sentences = {
        label: set(_sentences(library.package, module))
        for library in libraries.values()
        for label, module in library.modules.items()
    }
    num_labels_of: dict[str, int] = {}
    for found in sentences.values():
        for key in {text.lower() for text in found}:
            num_labels_of[key] = num_labels_of.get(key, 0) + 1

    corpus = Corpus(tuple(sentences), {}, {})
    for organisation, library in libraries.items():
        train: list[tuple[str, str]] = []
        test: list[tuple[str, str]] = []
        for label in library.modules:
            own = {text.lower(): text for text in sorted(sentences[label]) if num_labels_of[text.lower()] == 1}
            drawn = sorted(own.values(), key=lambda text: (derive_seed(seed, text), text))
            if len(drawn) < 2 * num_test:
                raise InputError(
                    f"{organisation}: the sources of {label} hold {len(drawn)} usable sentences, not {2 * num_test}",
                    hint="a stripped or very old installation has no docstrings; install the package from its wheel",
                )
            test += [(text, label) for text in drawn[:num_test]]
            train += [(text, label) for text in drawn[num_test : num_test + num_train]]
        folder = out_dir / organisation
        folder.mkdir(parents=True, exist_ok=True)
        corpus.train[organisation] = _write(folder / "train.jsonl", train)
        corpus.test[organisation] = _write(folder / "test.jsonl", test)
    return corpus


def _write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _sentences(package: str, module: str) -> Iterator[str]:
    for path in _source_files(_package_root(package), module):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template, or syntax of another Python version
        for docstring in _public_docstrings(tree.body):
            yield from (text for text in prose_sentences(docstring) if not _names_itself(text))


def _package_root(package: str) -> Path:
    if not package:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"the demo reads the sources of {package}", hint='pip install "fedmerge[demo]"')
    return Path(next(iter(spec.submodule_search_locations)))


def _source_files(root: Path, module: str) -> Iterable[Path]:
    path = root.joinpath(*module.split("."))
    if not path.is_dir():
        return [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else []
    skipped = {"tests", "test", "testing", "_vendor"}
    return sorted(file for file in path.rglob("*.py") if skipped.isdisjoint(file.relative_to(root).parts))


def _public_docstrings(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
            if isinstance(node, ast.ClassDef):
                yield from _public_docstrings(node.body)


_SECTION = re.compile(
    r"^[ \t]*(?:[-=~]{3,}|\.\. |>>>|:\w+[^:`\n]*:(?!`)|(?:Args|Arguments|Returns|Raises|Examples?|Note)s?:)",
    re.MULTILINE,
)
_MARKUP = [
    (re.compile(r":[a-z:+-]+:`~?([^`]*)`"), r"\1"),  # :class:`~torch.Tensor`
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),
    (re.compile(r"\*{1,2}(\w[^*]*)\*{1,2}"), r"\1"),
    (re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])"), ""),  # dotted names keep their last part
    (re.compile(r"\s+"), " "),
]
_SENTENCE_END = re.compile(r"(?<=[a-z)][.!?])\s+(?=[A-Z])")
_NOT_PROSE = re.compile(r">>>|::|[=|<>{}\\$@_]|https?:|\bdeprecated", re.IGNORECASE)
_OWN_NAMES = re.compile(r"scipy|sklearn|scikit|torch|python", re.IGNORECASE)


def prose_sentences(docstring: str, *, at_most: int = 4) -> list[str]:
    """Return the first sentences of `docstring`, without markup: those of its introduction that are prose.

    Prose has five to forty words and no code. Field lists, parameter sections and examples end the introduction.
    """
    section = _SECTION.search(docstring)
    introduction = docstring[: section.start()] if section else docstring
    found: list[str] = []
    for paragraph in introduction.strip().split("\n\n"):
        text = paragraph
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        found += _SENTENCE_END.split(text.strip())
    return [text for text in found[:at_most] if _is_prose(text)]


def _is_prose(text: str) -> bool:
    num_words = len(re.findall(r"[A-Za-z]{2,}", text))
    return 5 <= num_words <= 40 and text[0].isupper() and text[-1] != ":" and not _NOT_PROSE.search(text)


def _names_itself(text: str) -> bool:
    """Whether the sentence gives its software away by name instead of by what it says."""
    return _OWN_NAMES.search(text) is not None


if __name__ == "__main__":
    import sys

    # `python -m fedmerge_client.docstrings FOLDER` writes sample data to try fedmerge with.
    folder = Path(sys.argv[1])
    corpus = build_corpus(folder)
    (folder / "labels.txt").write_text("\n".join(corpus.labels) + "\n")
