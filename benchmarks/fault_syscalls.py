"""Stop a process at the n-th system call that changes its files, and kill it there or have the call fail.

As `strace -f -e inject` does, but counted over all threads of the process, and only on paths below one folder: a filter
in the kernel (seccomp) stops the process at these calls alone, and a tracer (ptrace) decides. Linux on x86-64.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import struct
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

# Number, and which arguments say what file it is: a descriptor, or a path after a directory's descriptor or none.
BY_DESCRIPTOR = {"write": 1, "pwrite64": 18, "fsync": 74, "fdatasync": 75, "ftruncate": 77}
BY_PATH = {"truncate": 76, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87}
BY_PATH_AT = {"mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265, "renameat2": 316}
NAMES = {number: name for calls in (BY_DESCRIPTOR, BY_PATH, BY_PATH_AT) for name, number in calls.items()}

# Digests, the folders of blobs, numbers of processes and files, and names of temporary files.
VARIES = r"[0-9a-f]{8,}|(?<=/)[0-9a-f]{2}(?=/|$)|(?<=\.)\d+(?=\.part)|(?<=#)\d+|(?<=\.tmp)\w{6}"

AT_FDCWD = 2**32 - 100
ALL = 2**64 - 1
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
RETURN_TRACE, RETURN_ALLOW = 0x7FF00000, 0x7FFF0000
PTRACE_CONT, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_SEIZE = 7, 12, 13, 0x4206
OPTIONS = 0x08 | 0x80 | 0x100000  # follow threads, stop at what the filter names, and nobody outlives the tracer
EVENT_SECCOMP, WAIT_ALL_THREADS = 7, 0x40000000
# Where the registers of interest stand in x86-64's struct user_regs_struct.
RAX, RDX, RSI, RDI, CALL, NUM_REGISTERS = 10, 12, 13, 14, 15, 27

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Fault(NamedTuple):
    """What to do at the `nth` call (from 1) whose kind is `kind` ("" for any): fail with `error`, or die of it if 0.

    `times` calls fail in a row.
    """

    nth: int
    kind: str = ""
    error: int = 0
    times: int = 1


def why_not() -> str:
    """Say why this can't be done here; empty where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are traced on Linux on x86-64 only"
    return ""


def await_tracer() -> None:
    """In the process to be traced: wait for the tracer, then ask the kernel to stop at each call of interest."""
    while b"TracerPid:\t0\n" in Path("/proc/self/status").read_bytes():
        time.sleep(0.001)
    numbers = sorted(NAMES)
    program = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the call's number
    program += [struct.pack("HBBI", 0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    program += [struct.pack("HBBI", 0x06, 0, 0, answer) for answer in (RETURN_ALLOW, RETURN_TRACE)]
    code = ctypes.create_string_buffer(b"".join(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    if _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def trace(pid: int, folder: Path, fault: Fault | None, out: Connection) -> None:
    """Trace a process until it ends, and send the kinds of calls it made on files in `folder`, in order."""
    seen: list[str] = []
    num_matches = 0
    if _ptrace(PTRACE_SEIZE, pid, data=OPTIONS):
        raise OSError(ctypes.get_errno(), "ptrace")
    while True:
        try:
            tid, status = os.waitpid(-1, WAIT_ALL_THREADS)
        except ChildProcessError:
            break
        if not os.WIFSTOPPED(status):
            continue
        event = status >> 16
        if event == EVENT_SECCOMP:
            registers = (ctypes.c_ulonglong * NUM_REGISTERS)()
            _ptrace(PTRACE_GETREGS, tid, data=ctypes.addressof(registers))
            kind = _kind(tid, registers, str(folder))
            if kind:
                seen.append(kind)
                num_matches += fault is not None and fault.kind in ("", kind)
                is_due = fault is not None and fault.kind in ("", kind) and num_matches >= fault.nth
                if is_due and fault is not None and not fault.error:
                    os.kill(pid, signal.SIGKILL)
                    fault = None
                elif is_due and fault is not None:
                    registers[CALL], registers[RAX] = ALL, ALL + 1 - fault.error  # no call, and what it returned
                    _ptrace(PTRACE_SETREGS, tid, data=ctypes.addressof(registers))
                    fault = fault if num_matches < fault.nth + fault.times - 1 else None
        is_signal = not event and os.WSTOPSIG(status) != signal.SIGTRAP
        _ptrace(PTRACE_CONT, tid, data=os.WSTOPSIG(status) if is_signal else 0)
    out.send(seen)


def _ptrace(request: int, tid: int, *, data: int) -> int:
    return int(_libc.ptrace(request, tid, None, data))


def _kind(tid: int, registers: ctypes.Array[ctypes.c_ulonglong], folder: str) -> str:
    """Return a call and its file, without what differs from run to run; empty when the file is not in `folder`."""
    name = NAMES.get(registers[CALL], "")
    try:
        if name in BY_DESCRIPTOR:
            path = str(Path(f"/proc/{tid}/fd/{registers[RDI]}").readlink())
        else:
            pointer = registers[RDI] if name in BY_PATH else registers[RSI]
            path = _text(tid, pointer)
            if not path.startswith("/"):
                near = registers[RDI] & 0xFFFFFFFF
                at = "cwd" if name in BY_PATH or near == AT_FDCWD else f"fd/{near}"
                path = f"{Path(f'/proc/{tid}/{at}').readlink()}/{path}"
    except OSError:
        return ""
    if not path.startswith(f"{folder}/") or path.endswith((".log", ".out")):
        return ""
    path = path.removeprefix(f"{folder}/").removesuffix(" (deleted)")
    return f"{name} {re.sub(VARIES, '*', path)}"


def _text(tid: int, pointer: int) -> str:
    """Read a path from a stopped process."""
    with Path(f"/proc/{tid}/mem").open("rb", buffering=0) as memory:
        memory.seek(pointer)
        return memory.read(4096 - pointer % 4096).partition(b"\0")[0].decode()
