"""The command table, and the one place where errors become a line and an exit code.

Commands are registered by import string, so that `fedmerge --help` loads neither torch nor grpc, and a command whose
extra is not installed says which one it needs.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownCommandError,
    UnusedCliTokensError,
)

from fedmerge.cli.output import configure_logging, print_problem, stderr
from fedmerge.cli.rounds import show as list_rounds
from fedmerge.errors import FedmergeError, MissingExtra, did_you_mean

TRACEBACK_VARIABLE = "FEDMERGE_TRACEBACK"
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_RESOURCE = 8
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

# Import name of each package that an extra brings. Some extras share packages.
EXTRAS: dict[str, tuple[str, ...]] = {
    "client": ("transformers", "peft", "sklearn", "google.rpc", "grpc_status"),
    "server": ("sqlalchemy", "alembic", "greenlet", "google.rpc", "grpc_status", "grpc_health"),
    "postgres": ("psycopg",),
    "s3": ("obstore",),
    "demo": ("sklearn",),
    "ray": ("ray",),
    "flower": ("flwr",),
    "plots": ("matplotlib", "pandas"),
    "parquet": ("pyarrow",),
    "rebasin": ("scipy",),
    "search": ("cmaes",),
}

EPILOGUE = """\
Exit codes: 0 ok, 1 bug, 2 usage or configuration, 3 verification failed,
4 coordinator unreachable, 5 round failed, 6 extra not installed,
7 refused by the coordinator, 8 disk, port or file, 9 nothing was due,
130 interrupted.
Environment: FEDMERGE_<SECTION>__<KEY> overrides fedmerge.toml,
FEDMERGE_LOG_LEVEL=DEBUG says more, FEDMERGE_TRACEBACK=1 shows tracebacks."""


def version() -> str:
    """Return the installed version."""
    return f"fedmerge {importlib.metadata.version('fedmerge')}"


app = App(
    name="fedmerge",
    help="Model merging as the communication step between organisations.",
    help_epilogue=EPILOGUE,
    version=version,
    help_format="plaintext",
    default_parameter=Parameter(negative=()),  # one way to say a thing: no --no-json beside --json
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
app["--help"].group = app["--version"].group = Group("Options", sort_key=9)

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Start": {
        "demo": ("fedmerge.cli.demo:demo", "Run a small federation here, from nothing to a signed model."),
        "init": ("fedmerge.cli.init:init", "Write a commented fedmerge.toml."),
        "doctor": ("fedmerge.cli.doctor:doctor", "Check this machine and a fedmerge.toml, and say what to mend."),
        "schema": ("fedmerge.cli.init:schema", "Print the JSON schema of fedmerge.toml, for editors."),
    },
    "Merge": {
        "merge": ("fedmerge.cli.merge:merge", "Merge fine-tuned models into one."),
        "statistics": ("fedmerge.cli.statistics:statistics", "Compute what fisher and regmean weigh a model by."),
        "diff": ("fedmerge.cli.diff:diff", "Show how fine-tunes interfere, before merging them."),
        "inspect": ("fedmerge.cli.inspect:inspect", "Show what is in a model or delta file."),
        "audit": ("fedmerge.cli.audit:audit", "Compare what members were shown of a coordinator's log."),
        "verify": ("fedmerge.cli.verify:verify", "Check a published model: signatures, digests, the merge itself."),
    },
    "Run": {
        "simulate": ("fedmerge.cli.simulate:simulate", "Run every node of a federation in one process."),
        "serve": ("fedmerge.cli.serve:serve", "Run the coordinator."),
        "join": ("fedmerge.cli.join:join", "Take part in a federation as a node."),
        "report": ("fedmerge.cli.report:report", "Show what merged models keep of the nodes' own."),
        "export": ("fedmerge.cli.export:export", "Write what an outsider needs to check rounds offline."),
        "copy": ("fedmerge.cli.copy:copy", "Copy a coordinator's ledger and blobs elsewhere."),
        "gc": ("fedmerge.cli.gc:gc", "Delete what nothing leads to from a store."),
    },
}
ROUND_COMMANDS: dict[str, tuple[str, str]] = {
    "pause": ("fedmerge.cli.rounds:pause", "Open and close no rounds for a while."),
    "resume": ("fedmerge.cli.rounds:resume", "End a pause."),
    "close": ("fedmerge.cli.rounds:close", "Close the open round with what it has."),
    "extend": ("fedmerge.cli.rounds:extend", "Move the open round's deadline."),
    "retry": ("fedmerge.cli.rounds:retry", "Open a round that failed again."),
    "rollback": ("fedmerge.cli.rounds:rollback", "Go on from an earlier version."),
}
KEY_COMMANDS: dict[str, tuple[str, str]] = {
    "new": ("fedmerge.cli.keys:new", "Make a signing key."),
    "show": ("fedmerge.cli.keys:show", "Show the public half of a key."),
    "trust": ("fedmerge.cli.keys:trust", "Add a node's public key to a federation."),
    "ca": ("fedmerge.cli.keys:ca", "Make a federation's own certificate authority."),
    "rotate": ("fedmerge.cli.keys:rotate", "Replace this site's key by a new one."),
    "handover": ("fedmerge.cli.keys:handover", "Replace the coordinator's key by a new one."),
}
NODE_COMMANDS: dict[str, tuple[str, str]] = {
    "list": ("fedmerge.cli.nodes:list_nodes", "List who is invited, pending, trusted or revoked."),
    "invite": ("fedmerge.cli.nodes:invite", "Print a join token for one node."),
    "approve": ("fedmerge.cli.nodes:approve", "Trust a key that a join token enrolled."),
    "revoke": ("fedmerge.cli.nodes:revoke", "Trust a node no more."),
}
# By the name of the command above them, with what it says of them.
TRUST_COMMANDS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "keys": ("Make, show and trust keys: new, show, trust, rotate, handover, ca.", KEY_COMMANDS),
    "nodes": ("Who takes part: list, invite, approve, revoke.", NODE_COMMANDS),
}

for _position, (_title, _commands) in enumerate(COMMANDS.items()):
    _group = Group(_title, sort_key=_position)
    for _sort_key, (_name, (_path, _help)) in enumerate(_commands.items()):
        app.command(_path, name=_name, help=_help, group=_group, sort_key=_sort_key, help_epilogue="")
# The group is that of the last commands above, "Run".
_rounds = App(name="rounds", help="List the rounds, and steer them.", help_epilogue="", group=_group, sort_key=9)
_rounds.default(list_rounds)
for _name, (_path, _help) in ROUND_COMMANDS.items():
    _rounds.command(_path, name=_name, help=_help, help_epilogue="")
app.command(_rounds)
_trust = Group("Trust", sort_key=4)
for _above, (_about, _commands) in TRUST_COMMANDS.items():
    _parent = App(name=_above, help=_about, help_epilogue="", group=_trust)
    for _name, (_path, _help) in _commands.items():
        _parent.command(_path, name=_name, help=_help, help_epilogue="")
    app.command(_parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (the process's own by default) and return its exit code."""
    arrived = _heed_signals()
    try:
        configure_logging()
        result = app(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as err:
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        if signal.SIGTERM in arrived:
            return EXIT_TERMINATED
        return _report(KeyboardInterrupt() if arrived else err)
    return result if isinstance(result, int) else 0


def _heed_signals() -> list[int]:
    """Have SIGTERM end commands as ctrl-C does: whatever is half-written is removed on the way out.

    Return a list of the signals that arrived, as they do: extensions such as torch now and then take what a handler
    raised for something else, and raise that.
    """
    arrived: list[int] = []

    def stop(number: int, _frame: object) -> None:
        arrived.append(number)
        if number == signal.SIGTERM:
            sys.exit(EXIT_TERMINATED)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background jobs
            signal.signal(signal.SIGINT, stop)
    return arrived


def _report(err: BaseException) -> int:
    """Print what went wrong as a line, and perhaps a hint; return the exit code."""
    if isinstance(err, OSError):
        _drop_unwritten_output()
    match _missing_extra(err) or err:
        case FedmergeError(message=message, hint=hint, exit_code=exit_code):
            return _fail(message, hint, exit_code)
        case CycloptsError() as usage_error:
            return _fail(*_usage(usage_error), EXIT_USAGE)
        case KeyboardInterrupt():
            stderr.print("interrupted")
            return EXIT_INTERRUPTED
        case BrokenPipeError():  # whoever read the output has left, as `head` does
            return EXIT_BROKEN_PIPE
        case OSError(errno=int(code), strerror=str(reason), filename=filename):
            return _fail(f"{filename}: {reason}" if filename else reason, _OS_HINTS.get(code), EXIT_RESOURCE)
    if isinstance(err, ImportError) and isinstance(err.__cause__, ImportError):
        err = err.__cause__  # cyclopts wraps what went wrong when it imported the command
    message = " ".join(f"{type(err).__name__}: {err}".split())
    print_problem("internal error", f"{message} (run with {TRACEBACK_VARIABLE}=1 for details)", style="bold red")
    return EXIT_BUG


_OS_HINTS = {
    errno.ENOSPC: "free some disk space and run the command again",
    errno.EACCES: "check who owns the file or folder, and its permissions",
    errno.EADDRINUSE: "another program has this port; choose another one",
}


def _drop_unwritten_output() -> None:
    """Where stdout can't be written, keep Python from trying again, and complaining, when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str | None, exit_code: int) -> int:
    print_problem("error", message, style="bold red")
    if hint:
        print_problem("hint", hint, style="cyan")
    return exit_code


def _usage(err: CycloptsError) -> tuple[str, str]:
    """Return what is wrong with the command line, and where its help is."""
    hint = f"see: {' '.join(['fedmerge', *(err.command_chain or ())])} --help"
    unused = (err.unused_tokens or [""])[0]
    if isinstance(err, UnknownCommandError):
        # Not the exception's own text, which would import every command to list them.
        names = [name for name in (err.app or app) if name.startswith("-") == unused.startswith("-")]
        kind = "option" if unused.startswith("-") else "command"
        return f"unknown {kind} {unused!r}{did_you_mean(unused, names)}", hint
    if isinstance(err, UnusedCliTokensError):
        return f"unexpected argument {unused!r}", hint
    text = " ".join(str(err).split()).removesuffix(".")
    if isinstance(err, MissingArgumentError) and err.argument:
        given = err.keyword or err.argument.tokens
        _, asks, suggestion = text.partition(" Did you mean ")
        problem = f"{err.keyword or err.argument.name} {'needs a value' if given else 'is missing'}"
        return problem + (f"; did you mean {suggestion}" if asks else ""), hint
    return text[:1].lower() + text[1:], hint


def _missing_extra(err: BaseException | None) -> MissingExtra | None:
    """Return the error to show when an import failed for want of an optional package."""
    while err is not None and not isinstance(err, FedmergeError) and not isinstance(err, ModuleNotFoundError):
        err = err.__cause__
    module = f"{err.name}." if isinstance(err, ModuleNotFoundError) else ""
    needed = {extra: name for extra, names in EXTRAS.items() for name in names if module.startswith(f"{name}.")}
    if not needed:
        return None
    return MissingExtra(f"the package {next(iter(needed.values()))} is not installed", hint=install_line(*needed))


def install_line(*extras: str) -> str:
    """Return the pip command that installs `extras`."""
    return f"pip install 'fedmerge[{','.join(extras)}]'"
