"""`fedmerge doctor`: is this machine fit for a federation, is the configuration, and what would mend what is not."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.text import Text

import fedmerge
from fedmerge.cli.app import EXIT_USAGE, EXTRAS, install_line
from fedmerge.cli.output import JsonFlag, format_bytes, print_json, stdout
from fedmerge.config import Config, load_config
from fedmerge.errors import FedmergeError, InputError, MissingExtra

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
PACKAGES = ("torch", "safetensors", "grpcio", "protobuf", "cryptography")
FREE_BYTES = 2 * 10**9
VALID_DAYS = 30


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, what was found, and what to do about it."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def doctor(
    config: Annotated[
        Path | None, Parameter(name="CONFIG", help="A fedmerge.toml. [default: the one here]", show_default=False)
    ] = None,
    /,
    *,
    json: JsonFlag = False,
) -> int:
    """Check this machine and a fedmerge.toml, and say what to mend. Exits with 2 when something fails."""
    checks = list(_machine())
    path = config or Path("fedmerge.toml")
    if config is None and not path.exists():
        checks.append(Check("config", "warn", "no fedmerge.toml here", "write one with: fedmerge init"))
    else:
        checks += _configuration(path)
    failed = any(check.status == "fail" for check in checks)
    if json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
        return EXIT_USAGE if failed else 0
    for check in checks:
        first, *more = check.detail.splitlines() or [""]
        stdout.print(Text.assemble((f"{check.status:4}", STYLES[check.status]), f"  {check.name:<9} {first}"))
        for line in more:
            stdout.print(Text(f"{'':16}{line}"))
        if check.fix:
            stdout.print(Text.assemble(f"{'':16}", (check.fix, "cyan")))
    return EXIT_USAGE if failed else 0


def _machine() -> Iterator[Check]:
    version = importlib.metadata.version("fedmerge")
    yield Check(
        "fedmerge", "ok", f"{version} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    yield Check("packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if not _installed(module)]
        if missing:
            yield Check(f"[{extra}]", "warn", f"not installed: {', '.join(missing)}", install_line(extra))
        else:
            yield Check(f"[{extra}]", "ok", "installed")
    yield _torch()
    yield _clock()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _torch() -> Check:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return Check("torch", "ok", f"device {device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")


def _clock() -> Check:
    """A clock that is earlier than the files of this installation is wrong; TLS and round deadlines depend on it."""
    now = dt.datetime.now(dt.UTC)
    installed = dt.datetime.fromtimestamp(Path(fedmerge.__file__).stat().st_mtime, dt.UTC)
    shown = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < installed:
        return Check("clock", "fail", f"{shown}, but fedmerge was installed on {installed:%Y-%m-%d}", "set the clock")
    return Check("clock", "ok", shown)


def _configuration(path: Path) -> Iterator[Check]:
    try:
        config = load_config(path)
    except FedmergeError as err:
        yield Check(
            "config",
            "fail",
            err.message,
            err.hint or "correct the file; every key is explained in what fedmerge init writes",
        )
        return
    yield Check("config", "ok", f"{path}: federation {config.federation.name}")
    checks: dict[str, tuple[Callable[[Config], Check], str]] = {
        "model": (_model, "set model.base to a folder that save_pretrained wrote"),
        "train": (_train, "correct [train]"),
        "codec": (_codec, "set model.base to a folder that save_pretrained wrote"),
        "disk": (_disk, "change federation.state"),
        "key": (_key, "change federation.key, or make one with: fedmerge keys new"),
        "trust": (_trust, "take the file out of federation.trusted"),
        "port": (_port, "change server.listen"),
        "tls": (_tls, "change server.tls_cert and server.tls_key, or leave both out"),
    }
    for name, (check, fix) in checks.items():
        try:
            yield check(config)
        except FedmergeError as err:
            yield Check(name, "fail", err.message, err.hint or fix)
        except OSError as err:
            yield Check(name, "fail", str(err), fix)


def _model(config: Config) -> Check:
    from fedmerge.tensors import Checkpoint

    config.model.label_names()
    schema = Checkpoint(config.model.base).schema
    num_elements = sum(spec.num_elements for spec in schema.values())
    fetched = "steps" if config.takes_steps(schema) else f"{config.downlink_codec(schema).values} updates"
    detail = f"{config.model.base}: {num_elements:,} parameters in {len(schema)} tensors; nodes fetch {fetched}"
    return Check("model", "ok", detail)


def _train(config: Config) -> Check:
    from fedmerge.training import check_plan

    try:
        check_plan(config.train.trainer, config.train.extras)
    except MissingExtra as err:
        return Check("train", "warn", f"not checked: {err.message}", err.hint or install_line("client"))
    return Check("train", "ok", f"{config.train.trainer} takes these settings")


def _codec(config: Config) -> Check:
    from fedmerge.delta.task_vector import delta_schema
    from fedmerge.tensors import Checkpoint

    schema = delta_schema(Checkpoint(config.model.base).schema)
    return Check("codec", "ok", str(config.uplink(schema)))


def _disk(config: Config) -> Check:
    folder = config.federation.state
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        return Check("disk", "fail", f"{existing} is a file", "change federation.state")
    if not os.access(existing, os.W_OK):
        return Check("disk", "fail", f"{existing} is not writable", "check who owns it, or change federation.state")
    free = shutil.disk_usage(existing).free
    detail = f"{format_bytes(free)} free for {folder}"
    # A round holds the deltas, the update and the new version, each up to the size of the model.
    needed = max(FREE_BYTES, (config.rounds.min_nodes + 2) * _weights_bytes(config.model.base))
    if free < needed:
        return Check(
            "disk", "warn", detail, f"a round can need {format_bytes(needed)}: free some, or change federation.state"
        )
    return Check("disk", "ok", detail)


def _weights_bytes(base: Path) -> int:
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def _key(config: Config) -> Check:
    from fedmerge.trust.sign import SigningKey

    path = config.federation.key
    if not path.exists():
        return Check("key", "ok", f"{path}: not there yet; made on first start")
    return Check("key", "ok", f"{path}: key id {SigningKey.load(path).public.short}, readable by its owner alone")


def _trust(config: Config) -> Check:
    from fedmerge.trust.keys import TrustStore

    names = sorted(TrustStore(config.federation.trusted).names().values())
    if len(names) < config.rounds.min_nodes:
        return Check(
            "trust",
            "warn",
            f"{len(names)} trusted, but a round needs {config.rounds.min_nodes} nodes",
            "add their public keys with: fedmerge keys trust FILE --name NAME",
        )
    return Check("trust", "ok", f"{len(names)} trusted: {', '.join(names)}")


def _port(config: Config) -> Check:
    host, port = config.server.address
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as err:
        fix = "stop the program that has it (is the coordinator running?), or change server.listen"
        return Check("port", "fail", f"can't listen on {config.server.listen} ({err.strerror})", fix)
    return Check("port", "ok", f"{config.server.listen} is free")


def _tls(config: Config) -> Check:
    from cryptography import x509

    if config.server.tls_cert is None or config.server.tls_key is None:
        if config.server.ca is None:
            return Check("tls", "ok", "a self-signed certificate is made on first start")
        from fedmerge.trust.certificates import Authority

        until = Authority.load(config.server.ca).certificate.not_valid_after_utc
        return Check("tls", "ok", f"certificates are issued by {config.server.ca}, until {until:%Y-%m-%d}")
    path = config.server.tls_cert
    config.server.tls_key.open("rb").close()
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as err:
        raise InputError(f"{path}: not a PEM certificate ({err})") from err
    now = dt.datetime.now(dt.UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    detail = f"{path}: valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}"
    if not begin <= now <= end:
        return Check("tls", "fail", detail, "renew the certificate; if it should be valid, check the clock")
    if end - now < dt.timedelta(days=VALID_DAYS):
        return Check("tls", "warn", detail, "renew the certificate soon")
    return Check("tls", "ok", detail)
