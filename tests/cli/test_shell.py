from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from safetensors.torch import save_file

from fedmerge.cli.app import (
    COMMANDS,
    EPILOGUE,
    EXTRAS,
    KEY_COMMANDS,
    NODE_COMMANDS,
    ROUND_COMMANDS,
    TRUST_COMMANDS,
    app,
)
from fedmerge.cli.init import template
from fedmerge.cli.output import JsonFormatter, format_bytes, format_ratio
from fedmerge.config import Config, load_config, parse_config
from fedmerge.config.load import SECTIONS
from fedmerge.errors import BY_REASON
from fedmerge.trust.sign import PublicKey, SigningKey
from tests.cli.commands import AS_IN_A_TERMINAL

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

# The whole command surface. A new command or option is added here on purpose, or not at all.
OPTIONS: dict[str, list[str]] = {
    "demo": ["--out", "--json"],
    "init": ["DIR"],
    "doctor": ["CONFIG", "--json"],
    "schema": [],
    "merge": [
        "MODEL", "--out", "--base", "--from", "--method", "--weights", "--set", "--scope", "--statistics", "--align",
        "--repair", "--trainer", "--option", "--search", "--evaluate", "--search-set", "--seed", "--key",
        "--max-shard-size", "--threads", "--engine", "--ray-address", "--memory", "--device", "--force", "--json",
    ],
    "statistics": ["MODEL", "--method", "--data", "--out", "--trainer", "--option", "--json"],
    "diff": ["MODEL", "--base", "--plot", "--seed", "--json"],
    "inspect": ["FILE", "--base", "--tuned", "--seed", "--json"],
    "audit": ["NOTES", "--trust", "--coordinator", "--key", "--passphrase-file", "--json"],
    "verify": ["DIRECTORY", "--key", "--trusted", "--replay", "--base", "--json"],
    "simulate": ["CONFIG", "--processes", "--sweep", "--report", "--json"],
    "serve": ["CONFIG", "--json"],
    "join": [
        "--coordinator", "--trust", "--token", "--data", "--test", "--key", "--passphrase-file",
        "--certificate", "--certificate-key", "--home", "--base", "--name", "--trainer", "--option",
        "--keep-tuned", "--keep-rounds", "--once", "--json",
    ],
    "report": ["CONFIG", "--metric", "--json"],
    "export": [
        "CONFIG", "--out", "--rounds", "--with-deltas",
        "--coordinator", "--trust", "--key", "--passphrase-file", "--json",
    ],
    "rounds": ["CONFIG", "--json"],
    "rounds pause": ["CONFIG", "--reason"],
    "rounds resume": ["CONFIG", "--reason"],
    "rounds close": ["CONFIG", "--reason"],
    "rounds extend": ["SECONDS", "CONFIG", "--reason"],
    "rounds retry": ["CONFIG", "--reason"],
    "rounds rollback": ["ROUND", "CONFIG", "--reason"],
    "copy": ["CONFIG", "--database", "--blobs", "--json"],
    "gc": ["CONFIG", "--forget-before", "--dry-run", "--json"],
    "keys new": ["PATH", "--algorithm", "--passphrase", "--passphrase-file", "--json"],
    "keys show": ["PATH", "--json"],
    "keys trust": ["PUBFILE", "--name", "--role", "--org", "--config", "--into"],
    "keys ca": ["DIR", "--days", "--passphrase", "--passphrase-file"],
    "nodes list": ["--config", "--json"],
    "nodes invite": ["NAME", "--org", "--role", "--expires", "--auto-approve", "--config", "--json"],
    "nodes approve": ["NAME", "--config", "--json"],
    "nodes revoke": ["NAME", "--reason", "--config", "--json"],
    "keys handover": ["CONFIG", "--algorithm", "--passphrase-file", "--json"],
    "keys rotate": ["PATH", "--coordinator", "--trust", "--algorithm", "--passphrase-file", "--json"],
}  # fmt: skip


def test_the_command_list_is_deliberate() -> None:
    assert {title: list(commands) for title, commands in COMMANDS.items()} == {
        "Start": ["demo", "init", "doctor", "schema"],
        "Merge": ["merge", "statistics", "diff", "inspect", "audit", "verify"],
        "Run": ["simulate", "serve", "join", "report", "export", "copy", "gc"],
    }
    assert list(KEY_COMMANDS) == ["new", "show", "trust", "ca", "rotate", "handover"]
    assert list(NODE_COMMANDS) == ["list", "invite", "approve", "revoke"]
    assert list(ROUND_COMMANDS) == ["pause", "resume", "close", "extend", "retry", "rollback"]
    listed = {name for commands in COMMANDS.values() for name in commands} | set(TRUST_COMMANDS) | {"rounds"}
    assert {name for name in app if not name.startswith("-")} == listed


def command_names() -> list[str]:
    below = [f"{above} {name}" for above, (_, commands) in TRUST_COMMANDS.items() for name in commands]
    below += ["rounds", *(f"rounds {name}" for name in ROUND_COMMANDS)]
    return [*(name for group in COMMANDS.values() for name in group), *below]


@pytest.mark.parametrize("name", command_names())
def test_the_options_of_every_command_are_deliberate(name: str) -> None:
    command = app
    for word in name.split():
        command = command[word]
    with app.app_stack(name.split()):  # options depend on what the commands above pass on
        arguments = command.assemble_argument_collection()
    assert [option for argument in arguments for option in argument.names] == OPTIONS[name]


def test_help_fits_a_terminal_and_loads_nothing_heavy(run: Run) -> None:
    heavy = "{'torch', 'numpy', 'grpc', 'pydantic', 'transformers', 'cryptography', 'sqlalchemy'}"
    program = f"import sys; from fedmerge.cli import main; main(['--help']); loaded = {heavy} & {{*sys.modules}}"
    result = run(python=f"{program}; sys.exit(str(loaded) if loaded else 0)")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 44
    for word in ["Start", "Merge", "Run", "Trust", "demo", "serve", "keys", "--version", *EPILOGUE.splitlines()]:
        assert word in result.stdout
    assert run().stdout == result.stdout == run("-h").stdout


def test_a_mistake_in_the_configuration_does_not_wait_for_torch(run: Run, tmp_path: Path) -> None:
    run("init")
    path = tmp_path / "fedmerge.toml"
    path.write_text(path.read_text().replace("min_nodes", "min_nods"))
    program = "import sys; from fedmerge.cli import main; main(['keys', 'trust', 'k.pub', '--name=a'])"
    run("keys", "new", "k")
    result = run(python=f"{program}; sys.exit('torch' in sys.modules)")
    assert (result.returncode, result.stdout) == (0, "")
    assert re.fullmatch(r"error: fedmerge\.toml:\d+: rounds\.min_nods: unknown key; did you .*\n", result.stderr)


@pytest.mark.parametrize("command", ["keys trust k.pub --name=a", "nodes list", "nodes invite b --org=o", "rounds"])
def test_what_an_operator_does_every_day_does_not_wait_for_torch(run: Run, command: str) -> None:
    run("init")
    run("keys", "new", "k")
    program = f"import sys; from fedmerge.cli import main; code = main({command.split()})"
    method = {"FEDMERGE_MERGE__METHOD": "ties"}
    result = run(python=f"{program}; sys.exit(9 if 'torch' in sys.modules else code)", env=method)
    no_state = command == "rounds"
    assert result.returncode == (2 if no_state else 0), result.stderr
    assert ("holds no federation yet" in result.stderr) == no_state


def test_every_exit_code_is_in_the_help() -> None:
    documented = set(map(int, re.findall(r"(\d+) [a-z]", EPILOGUE.partition("Environment")[0])))
    assert {cls.exit_code for cls in BY_REASON.values()} | {0, 130} == documented


def test_version_is_the_installed_one_from_either_way_to_start(run: Run) -> None:
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"fedmerge \d+\.\d+\.\d+\n", result.stdout)
    script = Path(sys.executable).with_name("fedmerge")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "see"),
    [
        ("dctor", "unknown command 'dctor'; did you mean 'doctor'?", "fedmerge --help"),
        ("frobnicate", "unknown command 'frobnicate'", "fedmerge --help"),
        ("--verson", "unknown option '--verson'; did you mean '--version'?", "fedmerge --help"),
        ("keys nwe", "unknown command 'nwe'; did you mean 'new'?", "fedmerge keys --help"),
        ("keys new", "PATH is missing", "fedmerge keys new --help"),
        ("keys new a --jsn", "unknown option: --jsn. Did you mean --json?", "fedmerge keys new --help"),
        ("keys new a b", "unexpected argument 'b'", "fedmerge keys new --help"),
        ("keys trust a", "--name is missing", "fedmerge keys trust --help"),
        ("keys trust a --name", "--name needs a value", "fedmerge keys trust --help"),
        (
            "keys trust a --nam b",
            "--name is missing; did you mean --name instead of --nam?",
            "fedmerge keys trust --help",
        ),
    ],
)
def test_a_mistyped_command_line_is_one_clear_line(run: Run, arguments: str, error: str, see: str) -> None:
    result = run(*arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {error}\nhint: see: {see}\n"


def probe(body: str) -> str:
    """A program that adds a command `probe` with this body and runs it, as an installed command would run."""
    lines = ["import sys", "from fedmerge.cli.app import app, main", "def probe():", f"    {body}"]
    return "\n".join([*lines, "app.command(probe)", "sys.exit(main(['probe']))"])


@pytest.mark.parametrize(
    ("body", "exit_code", "stderr"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        (
            "from fedmerge.errors import RoundFailed; raise RoundFailed('round 2: 1 of 3 nodes', hint='wait')",
            5,
            "error: round 2: 1 of 3 nodes\nhint: wait\n",
        ),
        (
            "from fedmerge.errors import Unreachable; raise Unreachable('a\\nb\\x1b[31m')",
            4,
            "error: a\nerror: b?[31m\n",
        ),
        ("raise KeyError('x')", 1, "internal error: KeyError: 'x' (run with FEDMERGE_TRACEBACK=1 for details)\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        (
            f"raise OSError({errno.ENOSPC}, 'No space left on device', 'state/blobs')",
            8,
            "error: state/blobs: No space left on device\nhint: free some disk space and run the command again\n",
        ),
        ("open('/')", 8, "error: /: Is a directory\n"),
        ("raise BrokenPipeError", 141, ""),
        (
            "sys.modules['grpc_health'] = None; import grpc_health",
            6,
            "error: the package grpc_health is not installed\nhint: pip install 'fedmerge[server]'\n",
        ),
        (
            "sys.modules['grpc_status'] = None; import grpc_status",
            6,
            "error: the package grpc_status is not installed\nhint: pip install 'fedmerge[client,server]'\n",
        ),
        (
            "import nowhere",
            1,
            "internal error: ModuleNotFoundError: No module named 'nowhere' "
            "(run with FEDMERGE_TRACEBACK=1 for details)\n",
        ),
    ],
)
def test_whatever_a_command_raises_is_a_line_and_an_exit_code(run: Run, body: str, exit_code: int, stderr: str) -> None:
    result = run(python=probe(body))
    assert (result.returncode, result.stderr) == (exit_code, stderr)
    traced = run(python=probe(body), env={"FEDMERGE_TRACEBACK": "1"})
    assert traced.returncode == exit_code
    assert traced.stderr.endswith(stderr)
    assert ("Traceback" in traced.stderr) is (not body.startswith("return"))


def test_a_command_whose_import_fails_names_the_extra(run: Run) -> None:
    program = "import sys; sys.modules['sklearn'] = None; from fedmerge.cli.app import app, main\n"
    program += "app.command('sklearn.x:y', name='probe'); sys.exit(main(['probe']))"
    result = run(python=program)
    assert (result.returncode, result.stderr) == (
        6,
        "error: the package sklearn is not installed\nhint: pip install 'fedmerge[client,demo]'\n",
    )
    # A mistyped command must not import the others to make its suggestion.
    assert run(python=program.replace("['probe']", "['prbe']")).stderr.startswith("error: unknown command 'prbe'; did")


def test_the_extras_are_those_of_the_package() -> None:
    metadata = importlib.metadata.metadata("fedmerge")
    assert set(metadata.get_all("Provides-Extra") or ()) == {*EXTRAS, "all"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_said_once(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "fedmerge", "schema"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=clean_environment, check=False,
        )  # fmt: skip
    assert result.returncode == 8
    assert result.stderr.splitlines()[0] == "error: No space left on device"
    assert len(result.stderr.splitlines()) == 2


def test_a_reader_that_left_is_no_error(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-m", "fedmerge", "schema"],
        stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=clean_environment, check=False,
    )  # fmt: skip
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, "")


MAIN = "from fedmerge.cli import main; raise SystemExit(main())"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_stops_quietly(tmp_path: Path, run: Run, clean_environment: dict[str, str]) -> None:
    run("keys", "new", "k")
    os.mkfifo(tmp_path / "fedmerge.toml")
    process = subprocess.Popen(
        [sys.executable, "-c", f"{AS_IN_A_TERMINAL}; {MAIN}", "keys", "trust", "k.pub", "--name", "a"],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=clean_environment,
    )  # fmt: skip
    with (tmp_path / "fedmerge.toml").open("w"):  # opens only once the command reads its other end
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_the_log_level_is_checked(run: Run) -> None:
    result = run("schema", env={"FEDMERGE_LOG_LEVEL": "loud"})
    assert result.returncode == 2
    assert result.stderr.startswith("error: FEDMERGE_LOG_LEVEL: should be one of DEBUG, INFO, ")


def test_logs_away_from_a_terminal_are_json_lines_on_stderr(run: Run) -> None:
    body = "import logging; log = logging.getLogger('fedmerge.x'); log.debug('no'); "
    body += "log.info('round %d open', 3, extra={'round': 3, 'seen': {1}}); logging.info('not ours')"
    result = run(python=probe(body))
    assert result.stdout == ""
    record = json.loads(result.stderr)
    assert datetime.fromisoformat(record.pop("time"))
    assert record == {"level": "INFO", "logger": "fedmerge.x", "message": "round 3 open", "round": 3, "seen": "{1}"}
    assert len(run(python=probe(body), env={"FEDMERGE_LOG_LEVEL": "debug"}).stderr.splitlines()) == 2
    assert run(python=probe(body), env={"FEDMERGE_LOG_LEVEL": "ERROR"}).stderr == ""


def test_an_exception_in_a_log_stays_on_its_line() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.LogRecord("fedmerge", logging.ERROR, __file__, 1, "failed", None, sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "ValueError: boom" in json.loads(line)["exception"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9949, "9.9 kB"), (9950, "10 kB"), (999_499, "999 kB"),
     (999_500, "1.0 MB"), (24_100_000, "24 MB"), (3_140_000_000, "3.1 GB"), (2 * 10**18, "2000 PB")],
)  # fmt: skip
def test_sizes_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_ratios_for_people() -> None:
    assert [format_ratio(ratio) for ratio in (1, 4.13, 9.94, 9.96, 37.9)] == ["1.0x", "4.1x", "9.9x", "10x", "38x"]


def test_init_writes_a_file_that_loads_and_is_never_overwritten(run: Run, tmp_path: Path) -> None:
    result = run("init", "new/place")
    assert (result.returncode, result.stdout) == (0, "")
    path = tmp_path / "new/place/fedmerge.toml"
    assert result.stderr == (
        "wrote new/place/fedmerge.toml; set model.base in it, then run: fedmerge doctor new/place/fedmerge.toml\n"
    )
    text = path.read_text()
    config = load_config(path, environ={"FEDMERGE_ROUNDS__MIN_NODES": "9"})
    assert config.model.base == tmp_path / "new/place/base-model"
    assert (config.recipe().method, config.robust_rules(), config.max_bad()) == ("trimmed_mean", ("spectral",), 2)
    again = run("init", "new/place")
    assert (again.returncode, path.read_text()) == (8, text)
    assert again.stderr.startswith("error: new/place/fedmerge.toml: already exists\nhint: ")
    (tmp_path / "file").touch()
    assert run("init", "file/x").stderr == "error: file/x/fedmerge.toml: could not be written (Not a directory)\n"


def test_the_written_file_has_every_key_with_its_default_below_its_documentation() -> None:
    text = template()
    config = parse_config(text, folder=Path("/f"), where="t")
    minimal = parse_config(
        '[federation]\nname = "my-federation"\n[model]\nbase = "base-model"\n', folder=Path("/f"), where="t"
    )
    assert config == minimal
    # Everything that is commented out is valid too.
    uncommented = re.sub(r"^# (?:# )?(?=\[\[|[a-z0-9_]+ = )", "", text, flags=re.MULTILINE)
    full = parse_config(uncommented, folder=Path("/f"), where="t")
    assert full.model.labels == ("negative", "positive")
    assert full.nodes[0].test == Path("/f/data/north-test.jsonl")
    _, *blocks = re.split(r"^(?:# )?\[\[?(\w+)\]\]?$", text, flags=re.MULTILINE)
    keys_of = dict(zip(blocks[::2], blocks[1::2], strict=True))
    assert list(keys_of) == list(Config.model_fields)
    for name, section in SECTIONS.items():
        # Paragraphs of comment lines and, last, the key; a key without a default is commented out.
        found = re.findall(r"((?:^# .+\n)+?)^(# )?([a-z0-9_]+) = ", keys_of[name], flags=re.MULTILINE)
        written = {key: (" ".join(doc.replace("# ", "").split()), bool(commented)) for doc, commented, key in found}
        assert written == {
            key: (" ".join((field.description or "").split()), field.default in (None, ()))
            for key, field in section.model_fields.items()
        }
    assert max(map(len, text.splitlines())) <= 100


def test_schema_is_json(run: Run) -> None:
    result = run("schema")
    assert result.returncode == 0
    assert json.loads(result.stdout)["properties"].keys() == {*SECTIONS, "nodes"}


def test_keys_new_show_and_trust(run: Run, tmp_path: Path) -> None:
    made = json.loads(run("keys", "new", "north.key", "--json").stdout)
    private, public = tmp_path / made["private"], tmp_path / made["public"]
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert made["key_id"] == SigningKey.load(private).public.key_id == PublicKey.load(public).key_id

    for path in (private, public):
        shown = run("keys", "show", path)
        assert shown.stdout == f"key id {made['key_id']} (ed25519)\n{public.read_text()}"
        assert json.loads(run("keys", "show", path, "--json").stdout) == {
            "key_id": made["key_id"],
            "algorithm": "ed25519",
            "pem": public.read_text(),
        }
    (tmp_path / "from-show.pem").write_text(shown.stdout)  # what was shown is a key file again
    assert PublicKey.load(tmp_path / "from-show.pem").key_id == made["key_id"]

    run("init")
    trusted = run("keys", "trust", public, "--name", "north")
    assert trusted.stdout == f"trusted north, key id {made['key_id']}, in {tmp_path / 'trusted/north.pem'}\n"
    assert PublicKey.load(tmp_path / "trusted/north.pem").key_id == made["key_id"]
    assert run("keys", "trust", public, "--name", "north").returncode == 0
    assert run("keys", "trust", public, "--name", "north", "--into", "elsewhere").returncode == 0
    assert PublicKey.load(tmp_path / "elsewhere/north.pem").key_id == made["key_id"]

    refused = run("keys", "trust", public, "--name", "south")
    assert (refused.returncode, refused.stderr) == (2, f"error: {public}: this key is already trusted, as north\n")
    run("keys", "new", "other")
    assert "already known with another key" in run("keys", "trust", "other.pub", "--name", "north").stderr
    assert "exclude each other" in run("keys", "trust", "other.pub", "--name=a", "--into=x", "--config=y").stderr
    leaked = run("keys", "trust", "other", "--name", "other")
    assert leaked.returncode == 2
    assert leaked.stderr.startswith("error: other: is a private key, which nobody but its owner should have\n")
    assert not (tmp_path / "trusted/other.pem").exists()


def test_keys_are_never_overwritten(run: Run, tmp_path: Path) -> None:
    assert run("keys", "new", "a").returncode == 0
    before = (tmp_path / "a").read_bytes(), (tmp_path / "a.pub").read_bytes()
    assert run("keys", "new", "a").returncode == 8
    (tmp_path / "a").rename(tmp_path / "b")
    result = run("keys", "new", "a")
    assert (result.returncode, result.stderr.splitlines()[0]) == (8, "error: a.pub: already exists")
    assert not (tmp_path / "a").exists()
    assert ((tmp_path / "b").read_bytes(), (tmp_path / "a.pub").read_bytes()) == before


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_keys_that_can_not_be_used(run: Run, tmp_path: Path) -> None:
    run("keys", "new", "a")
    (tmp_path / "a").chmod(0o644)
    shared = run("keys", "show", "a")
    assert (shared.returncode, shared.stdout) == (2, "")
    assert shared.stderr == "error: a: other users can read this private key\nhint: run: chmod 600 a\n"
    assert run("keys", "show", "none").stderr == "error: none: can't be read (No such file or directory)\n"
    (tmp_path / "text").write_text("hello")
    assert run("keys", "show", "text").stderr.startswith("error: text: holds no PUBLIC KEY block\nhint: ")
    if os.geteuid() != 0:
        (tmp_path / "a").chmod(0)
        assert run("keys", "show", "a").stderr == "error: a: can't be read (Permission denied)\n"


def checks(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    report = json.loads(result.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is all(check["status"] != "fail" for check in found.values())
    assert result.returncode == (0 if report["ok"] else 2)
    assert all(check["fix"] for check in found.values() if check["status"] != "ok")
    return found


def certificate(not_after: datetime) -> bytes:
    key, name = Ed25519PrivateKey.generate(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "c")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, datetime(2020, 1, 1, tzinfo=UTC), not_after)
    return builder.sign(key, None).public_bytes(serialization.Encoding.PEM)


def test_doctor_without_a_configuration(run: Run) -> None:
    found = checks(run("doctor", "--json"))
    assert {name for name in found if name.startswith("[")} == {f"[{extra}]" for extra in EXTRAS}
    assert torch.__version__ in found["packages"]["detail"]
    assert found["config"]["fix"] == "write one with: fedmerge init"
    text = run("doctor").stdout.splitlines()
    assert text[0].startswith("ok    fedmerge  ")
    assert "warn  config    no fedmerge.toml here" in text


def test_doctor_on_a_healthy_federation(run: Run, tmp_path: Path) -> None:
    (tmp_path / "base-model").mkdir()
    save_file({"w": torch.zeros(3, 4)}, tmp_path / "base-model/model.safetensors")
    run("init")
    run("keys", "new", "coordinator.key")
    for name in ("north", "south"):
        run("keys", "new", name)
        run("keys", "trust", f"{name}.pub", "--name", name)
    soon = datetime.now(UTC) + timedelta(days=90)
    (tmp_path / "c.pem").write_bytes(certificate(soon))
    environment = {
        "FEDMERGE_SERVER__TLS_CERT": str(tmp_path / "c.pem"),
        "FEDMERGE_SERVER__TLS_KEY": str(tmp_path / "coordinator.key"),
        "FEDMERGE_SERVER__LISTEN": "127.0.0.1:0",
    }
    found = checks(run("doctor", "--json", env=environment))
    bad = {name: check for name, check in found.items() if check["status"] != "ok" and not name.startswith("[")}
    assert {name: check for name, check in bad.items() if name != "disk"} == {}
    assert found["model"]["detail"].endswith("12 parameters in 1 tensors; nodes fetch int8 updates")
    assert found["trust"]["detail"] == "2 trusted: north, south"
    assert not (tmp_path / "state").exists()  # looking changes nothing


def test_doctor_says_what_to_mend(run: Run, tmp_path: Path) -> None:
    run("init")
    run("keys", "new", "coordinator.key")
    (tmp_path / "coordinator.key").chmod(0o644)
    (tmp_path / "c.pem").write_bytes(certificate(datetime(2021, 1, 1, tzinfo=UTC)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {
            "FEDMERGE_SERVER__LISTEN": f"127.0.0.1:{server.getsockname()[1]}",
            "FEDMERGE_SERVER__TLS_CERT": "c.pem",
            "FEDMERGE_SERVER__TLS_KEY": "coordinator.key",
        }
        found = checks(run("doctor", "fedmerge.toml", "--json", env=environment))
    statuses = {name: found[name]["status"] for name in ("config", "model", "key", "trust", "port", "tls")}
    assert statuses == {"config": "ok", "model": "fail", "key": "fail", "trust": "warn", "port": "fail", "tls": "fail"}
    assert found["key"]["fix"] == f"run: chmod 600 {tmp_path / 'coordinator.key'}"
    assert "2020-01-01 to 2021-01-01" in found["tls"]["detail"]
    assert "is the coordinator running?" in found["port"]["fix"]


def test_doctor_on_a_broken_configuration(run: Run, tmp_path: Path) -> None:
    assert checks(run("doctor", "none.toml", "--json"))["config"]["status"] == "fail"
    (tmp_path / "fedmerge.toml").write_text("[rounds]\nmin_nods = 2\n")
    result = run("doctor")
    assert result.returncode == 2
    assert "fail  config    fedmerge.toml:1: federation.name: required key is missing\n" in result.stdout
    assert "                fedmerge.toml:2: rounds.min_nods: unknown key; did you mean 'min_nodes'?\n" in result.stdout
