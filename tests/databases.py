"""A private PostgreSQL server for tests, from the Debian package, on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest

REASON = "no PostgreSQL server is installed (Debian: apt-get install postgresql)"
# A server refuses to run as root; the package brings this user.
USER = "postgres"


class PostgresServer:
    """A server without a network port. What it has committed survives `restart`, which kills it."""

    def __init__(self) -> None:
        found = [
            Path(path) for path in (shutil.which("pg_ctl"), *Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")) if path
        ]
        if not found or os.name != "posix":
            pytest.skip(REASON)
        self._bin = found[-1].resolve().parent
        self.folder = Path(tempfile.mkdtemp(prefix="fedmerge-pg-"))
        self._as_user: list[str] = []
        self._user = pwd.getpwuid(os.getuid()).pw_name
        if os.getuid() == 0:
            try:
                shutil.chown(self.folder, USER)
            except LookupError:
                pytest.skip(REASON)
            self._as_user, self._user = ["runuser", "-u", USER, "--"], USER
        self._num_databases = 0
        self._run("initdb", "-D", "data", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        # The machine stays up, so what was written is there after any kill, synced or not.
        options = "listen_addresses=''", f"unix_socket_directories='{self.folder}'", "fsync=off", "max_connections=50"
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write("\n".join(options) + "\n")
        self.start()

    def new_database(self) -> str:
        """Make an empty database and return its URL."""
        self._num_databases += 1
        name = f"ledger{self._num_databases}"
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{self._user}@/{name}?host={self.folder}"

    def dsn(self, database: str) -> str:
        """Return what psycopg connects to a database with."""
        return f"host={self.folder} user={self._user} dbname={database}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "start")

    def kill(self) -> None:
        """End the server at once, and every connection with it."""
        self._run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")

    def remove(self) -> None:
        """End the server and delete all it has."""
        self.kill()
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._bin / program), *arguments]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
