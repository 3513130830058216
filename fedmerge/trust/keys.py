"""Who is trusted: a folder of public keys, which is looked at again whenever it matters.

`NAME.pem` is a key that is trusted, with its organisation and role in lines above it. `pending/NAME.pem` waits for the
operator, `revoked/NAME-KEYID.pem` was trusted once. `invited/NAME.json` is an invitation that nobody has taken up yet.
Whatever moves a key does so with one rename or one new file, so a coordinator never reads half of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmerge.errors import InputError, InvalidToken, PendingKey, Refused, RevokedKey, UntrustedKey, reporting_os_errors
from fedmerge.files import replace_file, write_new
from fedmerge.trust.sign import NEVER_OVERWRITTEN, PublicKey, read_text

Role: TypeAlias = Literal["node", "auditor"]
ROLES: tuple[Role, ...] = get_args(Role)

PENDING, REVOKED, INVITED = "pending", "revoked", "invited"
TOKEN_PREFIX = "fedmerge-join-"
ASK_OPERATOR = "ask the operator of the coordinator"


@dataclass(frozen=True)
class Member:
    """A party that is known here: its name, its key, the organisation it belongs to (by default its name), its role.

    A node takes part in rounds; an auditor may fetch all that it takes to check them.
    """

    name: str
    key: PublicKey
    organisation: str
    role: Role = "node"
    reason: str = ""

    def to_text(self) -> str:
        """Return the file that keeps it: lines of `field: value`, which PEM allows, and the key."""
        fields = {"organisation": self.organisation, "role": self.role}
        fields |= {"reason": self.reason} if self.reason else {}
        return "".join(f"{field}: {value}\n" for field, value in fields.items()) + self.key.pem()

    @classmethod
    def load(cls, path: Path, name: str) -> Member:
        """Read such a file, or a plain PEM; raise `InputError` when it holds no public key."""
        text = read_text(path)
        lines = text.partition("-----BEGIN")[0].splitlines()
        fields = {field: value for field, separator, value in (line.partition(": ") for line in lines) if separator}
        key = PublicKey.from_pem(text, where=str(path))
        roles: dict[str, Role] = {role: role for role in ROLES}
        role = roles.get(fields.get("role", "node"))
        if role is None:
            raise InputError(f"{path}: unknown role {fields['role']!r}", hint=f"one of {', '.join(ROLES)}")
        return cls(name, key, fields.get("organisation", name), role, fields.get("reason", ""))


class Invitation(BaseModel):
    """Who a join token is for. Of the token itself only its SHA-256 is kept."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    token: str
    organisation: str
    role: Role
    expires_at_s: float
    approved: bool


@dataclass(frozen=True)
class _Seen:
    """The folder as it was when it last changed: the time and content of each file, and all that follows from them."""

    files: Mapping[str, tuple[int, Member]]
    members: Mapping[str, Member]
    names: Mapping[str, str]
    keys: Mapping[str, PublicKey]

    @classmethod
    def of(cls, files: Mapping[str, tuple[int, Member]]) -> _Seen:
        members = {member.key.key_id: member for _, member in files.values()}
        names = {key_id: member.name for key_id, member in members.items()}
        keys = {key_id: member.key for key_id, member in members.items() if member.role == "node"}
        return cls(files, members, names, keys)


class TrustStore:
    """A folder of PEM public keys, one file `NAME.pem` for each party that is trusted."""

    # A coordinator looks a key up for every chunk and call: what has not changed is not read again, nor made again.
    _seen = _Seen.of({})

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def members(self) -> Mapping[str, Member]:
        """Return who is trusted, by key id: the same object until that changes.

        Raises `InputError` when a file in the folder is not a public key.
        """
        return self._look().members

    def names(self) -> Mapping[str, str]:
        """Return the party's name by key id."""
        return self._look().names

    def keys(self) -> Mapping[str, PublicKey]:
        """Return the trusted keys of nodes, by key id."""
        return self._look().keys

    def pending(self) -> list[Member]:
        """Return who waits for approval."""
        return [Member.load(path, path.stem) for path in sorted((self.directory / PENDING).glob("*.pem"))]

    def revoked(self) -> list[Member]:
        """Return whose keys were trusted once, with the reason."""
        return [self._load_revoked(path) for path in sorted((self.directory / REVOKED).glob("*.pem"))]

    def require(self, key_id: str) -> Member:
        """Return who has a trusted key; raise `RevokedKey`, `PendingKey` or `UntrustedKey` when nobody has."""
        member = self._unchanged(key_id) or self.members().get(key_id)
        if member is not None:
            return member
        for path in (self.directory / REVOKED).glob(f"*-{key_id[:12]}.pem"):
            revoked = self._load_revoked(path)
            if revoked.key.key_id == key_id:
                raise RevokedKey(f"key {key_id[:12]} was revoked: {revoked.reason}", hint=ASK_OPERATOR)
        if any(member.key.key_id == key_id for member in self.pending()):
            raise PendingKey(f"key {key_id[:12]} waits for the operator's approval", hint=ASK_OPERATOR)
        raise UntrustedKey(f"key {key_id[:12]} is not trusted", hint=ASK_OPERATOR)

    def add(
        self, key: PublicKey, name: str, organisation: str | None = None, role: Role = "node", *, durable: bool = True
    ) -> Path:
        """Trust `key` under `name`; raise `InputError` when the name is unusable or stands for another key.

        Unless it is `durable`, a power cut may undo it.
        """
        require_name(name)
        path = self._path(name)
        if not path.exists():
            member = Member(name, key, require_text(organisation or name), role)
            write_new(path, member.to_text().encode(), if_exists=NEVER_OVERWRITTEN, durable=durable)
        elif PublicKey.load(path) != key:
            raise InputError(f"{path}: {name} is already known with another key", hint="remove the old file first")
        return path

    def require_new(self, key: PublicKey) -> None:
        """Raise `Refused` when `key` is or was known here."""
        try:
            self.require(key.key_id)
        except RevokedKey as err:
            raise Refused(f"key {key.short} was given up or revoked before", hint="make another one") from err
        except PendingKey:
            pass
        except UntrustedKey:
            return
        raise Refused(f"key {key.short} is in use already", hint="make another one")

    def succeed(self, old: Member, new: PublicKey) -> None:
        """Trust `new` in place of the key of `old`, under the same name."""
        self._keep_revoked(old, f"replaced by its owner with key {new.short}")
        replace_file(self._path(old.name), replace(old, key=new).to_text().encode())

    def invite(self, name: str, organisation: str, role: Role = "node", *, expires_at_s: float, approved: bool) -> str:
        """Return a join token for one new key called `name`; an earlier token for that name is worth nothing then.

        `approved` says that the key is trusted as soon as it comes, `expires_at_s` is on the coordinator's wall clock.
        Raises `InputError` when the name is unusable or taken.
        """
        require_name(name)
        if self._path(name).exists() or self._path(name, PENDING).exists():
            raise InputError(f"{name} is already known here", hint="choose another name, or revoke it first")
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        invitation = Invitation(
            token=token_digest(token),
            organisation=require_text(organisation),
            role=role,
            expires_at_s=expires_at_s,
            approved=approved,
        )
        replace_file(self._invitation(name), invitation.model_dump_json(indent=2).encode())
        return token

    def invitations(self) -> dict[str, Invitation]:
        """Return the open invitations by name."""
        found: dict[str, Invitation] = {}
        for path in sorted((self.directory / INVITED).glob("*.json")):
            try:
                found[path.stem] = Invitation.model_validate(json.loads(read_text(path)))
            except (ValueError, ValidationError) as err:
                raise InputError(f"{path}: not an invitation", hint="remove it, and invite the node again") from err
        return found

    def redeem(self, token: str, key: PublicKey, now_s: float) -> bool:
        """Enrol `key` by a join token, once; return whether it is trusted now, or else waits for approval.

        A key that the same token enrolled before is answered again. Raises `InvalidToken`, or `Refused` when the key
        is or was known here otherwise.
        """
        digest, found = token_digest(token), None
        for name, invitation in self.invitations().items():
            if hmac.compare_digest(invitation.token, digest):
                found = name, invitation
        if found is None:
            raise InvalidToken("the join token is unknown, or was used", hint="ask the operator for a new one")
        name, invitation = found
        if now_s >= invitation.expires_at_s:
            raise InvalidToken("the join token has expired", hint="ask the operator for a new one")
        self.require_new(key)
        path = self._path(name) if invitation.approved else self._path(name, PENDING)
        member = Member(name, key, invitation.organisation, invitation.role)
        write_new(path, member.to_text().encode(), if_exists=NEVER_OVERWRITTEN)
        # Only now: after a crash in between, the name is taken, so the token can't be used for another key.
        self._invitation(name).unlink()
        return invitation.approved

    def approve(self, name: str) -> Member:
        """Trust a key that waits for it; raise `InputError` when there is none of that name."""
        require_name(name)
        waiting, path = self._path(name, PENDING), self._path(name)
        if not waiting.exists():
            raise InputError(f"{name}: no key of that name waits for approval", hint="see: fedmerge nodes list")
        member = Member.load(waiting, name)
        with reporting_os_errors(path):
            path.hardlink_to(waiting)  # unlike a rename, never in place of another key
            waiting.unlink()
        return member

    def revoke(self, name: str, reason: str) -> list[Member]:
        """Trust nothing of `name` any more: no key, pending key or invitation; return the keys that it had.

        Raises `InputError` when the name is not known.
        """
        require_name(name)
        paths = [path for path in (self._path(name), self._path(name, PENDING)) if path.exists()]
        if not paths and not self._invitation(name).exists():
            raise InputError(f"{name}: not known here", hint="see: fedmerge nodes list")
        self._invitation(name).unlink(missing_ok=True)
        members = [Member.load(path, name) for path in paths]
        for member in members:
            self._keep_revoked(member, require_text(reason))
        for path in paths:
            path.unlink()
        return members

    def _path(self, name: str, folder: str = "") -> Path:
        return self.directory / folder / f"{name}.pem"

    def _invitation(self, name: str) -> Path:
        return self.directory / INVITED / f"{name}.json"

    def _load_revoked(self, path: Path) -> Member:
        return Member.load(path, path.stem.rpartition("-")[0])

    def _keep_revoked(self, member: Member, reason: str) -> None:
        path = self._path(f"{member.name}-{member.key.short}", REVOKED)
        replace_file(path, replace(member, reason=reason).to_text().encode())

    def _unchanged(self, key_id: str) -> Member | None:
        """Return who has the key, if the file that said so is still as it was; the others need not be looked at."""
        seen = self._seen
        member = seen.members.get(key_id)
        if member is None:
            return None
        path = self._path(member.name)
        try:
            return member if path.stat().st_mtime_ns == seen.files[path.name][0] else None
        except FileNotFoundError:
            return None

    def _look(self) -> _Seen:
        seen, files = self._seen, dict[str, tuple[int, Member]]()
        try:
            with os.scandir(self.directory) as entries:
                found = sorted((each for each in entries if each.name.endswith(".pem")), key=lambda each: each.name)
        except FileNotFoundError:
            found = []
        except NotADirectoryError as err:
            raise InputError(f"{self.directory}: should be a folder of public keys") from err
        for each in found:
            try:
                changed_ns, known = each.stat().st_mtime_ns, seen.files.get(each.name)
            except FileNotFoundError:  # revoked between looking at the folder and at the file
                continue
            if known is None or known[0] != changed_ns:
                known = changed_ns, Member.load(Path(each), Path(each).stem)
            files[each.name] = known
        if files != seen.files:
            self._seen = seen = _Seen.of(files)
        return seen


def token_digest(token: str) -> str:
    """Return the SHA-256 (hex) by which a join token is known. It has 256 random bits, so it needs no salt."""
    return hashlib.sha256(token.encode()).hexdigest()


def require_name(name: str) -> str:
    """Return `name`; raise `InputError` unless it can be a file's."""
    if not name or len(name) > 100 or not all(char.isalnum() or char in "-_." for char in name) or name[0] == ".":
        raise InputError(f"{name!r} is not a usable name", hint="use letters, digits, '-', '_' and '.'")
    return name


def require_text(text: str) -> str:
    """Return `text` on one line; raise `InputError` when it is empty, too long or not printable."""
    line = " ".join(text.split())
    if not line or len(line) > 200 or not line.isprintable():
        raise InputError(f"{text!r:.60}: should be a line of at most 200 printable characters")
    return line
