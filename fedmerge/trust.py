"""Who is trusted: a folder of public keys, which is looked at again whenever it matters.

`NAME.pem` is a key that is trusted, `revoked/NAME-KEYID.pem` one that was, with the reason in its first line.
"""

from __future__ import annotations

from pathlib import Path

from fedmerge.errors import InputError, Refused, RevokedKey, UntrustedKey
from fedmerge.files import replace_file, write_new
from fedmerge.sign import NEVER_OVERWRITTEN, PublicKey, read_text

REVOKED = "revoked"


class TrustStore:
    """A folder of PEM public keys, one file `NAME.pem` for each party that is trusted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # A coordinator looks a key up for every chunk; a file is read again only when it has changed.
        self._read: dict[Path, tuple[int, PublicKey]] = {}

    def names(self) -> dict[str, str]:
        """Return the party's name by key id."""
        return {key.key_id: path.stem for path, key in self._load().items()}

    def keys(self) -> dict[str, PublicKey]:
        """Return the trusted keys by key id; raise `InputError` when a file in the folder is not a public key."""
        return {key.key_id: key for key in self._load().values()}

    def require(self, key_id: str) -> PublicKey:
        """Return a trusted key by its id; raise `RevokedKey` when it was trusted once, else `UntrustedKey`."""
        key = self.keys().get(key_id)
        if key is not None:
            return key
        for path in sorted((self.directory / REVOKED).glob(f"*-{key_id[:12]}.pem")):
            if PublicKey.load(path).key_id == key_id:
                reason = read_text(path).partition("\n")[0]
                raise RevokedKey(f"key {key_id[:12]} was revoked: {reason}", hint="ask the operator of the coordinator")
        raise UntrustedKey(f"key {key_id[:12]} is not trusted", hint="ask the operator of the coordinator")

    def add(self, key: PublicKey, name: str) -> Path:
        """Trust `key` under `name`; raise `InputError` when the name is unusable or stands for another key."""
        if not name or not all(char.isalnum() or char in "-_." for char in name) or name.startswith("."):
            raise InputError(f"{name!r} is not a usable name", hint="use letters, digits, '-', '_' and '.'")
        path = self.directory / f"{name}.pem"
        if not path.exists():
            write_new(path, key.pem().encode(), if_exists=NEVER_OVERWRITTEN)
        elif PublicKey.load(path) != key:
            raise InputError(f"{path}: {name} is already known with another key", hint="remove the old file first")
        return path

    def require_new(self, key: PublicKey) -> None:
        """Raise `Refused` when `key` is or was known here."""
        try:
            self.require(key.key_id)
        except RevokedKey as err:
            raise Refused(f"key {key.short} was given up or revoked before", hint="make another one") from err
        except UntrustedKey:
            return
        raise Refused(f"key {key.short} is in use already", hint="make another one")

    def succeed(self, old: PublicKey, new: PublicKey) -> None:
        """Trust `new` in place of `old`, under the same name."""
        name = self.names()[old.key_id]
        self._keep_revoked(old, name, f"replaced by its owner with key {new.short}")
        replace_file(self.directory / f"{name}.pem", new.pem().encode())

    def _keep_revoked(self, key: PublicKey, name: str, reason: str) -> None:
        line = " ".join(reason.split()) or "no reason given"
        replace_file(self.directory / REVOKED / f"{name}-{key.short}.pem", f"{line}\n{key.pem()}".encode())

    def _load(self) -> dict[Path, PublicKey]:
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{self.directory}: should be a folder of public keys")
        read: dict[Path, tuple[int, PublicKey]] = {}
        for path in sorted(self.directory.glob("*.pem")):
            changed_ns = path.stat().st_mtime_ns
            known = self._read.get(path)
            read[path] = known if known and known[0] == changed_ns else (changed_ns, PublicKey.load(path))
        self._read = read
        return {path: key for path, (_, key) in read.items()}
