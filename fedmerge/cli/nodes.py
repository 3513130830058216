"""`fedmerge nodes`: invite, approve and revoke who takes part in a federation, and list them.

These work on the federation's folder of keys, which a running coordinator looks at before every call.
"""

from __future__ import annotations

import datetime as dt
import re
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, printable, stderr
from fedmerge.config import Config, load_config
from fedmerge.errors import ConfigError
from fedmerge.trust.keys import Member, Role, TrustStore

ConfigPath: TypeAlias = Annotated[Path, Parameter(help="The federation's configuration.")]
NodeName: TypeAlias = Annotated[str, Parameter(name="NAME", help="What the node is called here.")]

DEFAULT_CONFIG = Path("fedmerge.toml")
SECONDS = {"m": 60, "h": 3600, "d": 86400}


def list_nodes(*, config: ConfigPath = DEFAULT_CONFIG, json: JsonFlag = False) -> None:
    """List who is invited, waits for approval, is trusted, or was revoked."""
    store = TrustStore(load_config(config, to_merge=False).federation.trusted)
    now_s, rows = time.time(), list[dict[str, Any]]()
    for name, invitation in store.invitations().items():
        status = "invited" if now_s < invitation.expires_at_s else "expired"
        expires = dt.datetime.fromtimestamp(invitation.expires_at_s, dt.UTC).isoformat(timespec="seconds")
        rows.append(_row(name, invitation.organisation, invitation.role, status) | {"expires": expires})
    rows += [_row_of(member, "pending") for member in store.pending()]
    rows += [_row_of(member, "trusted") for member in store.members().values()]
    rows += [_row_of(member, "revoked") for member in store.revoked()]
    if json:
        print_json({"nodes": rows})
        return
    width = {column: max([len(column), *(len(row[column]) for row in rows)]) for column in ("name", "organisation")}
    for row in [_row("name", "organisation", "role", "status", "key id"), *rows]:
        name, organisation = row["name"].ljust(width["name"]), row["organisation"].ljust(width["organisation"])
        more = row.get("reason") or (f"until {row['expires']}" if "expires" in row else "")
        line = f"{name}  {organisation}  {row['role']:<7}  {row['status']:<7}  {row['key_id'][:12]:<12}  {more}"
        sys.stdout.write(printable(line.rstrip()) + "\n")


def invite(
    name: NodeName,
    /,
    *,
    org: Annotated[str, Parameter(help="The organisation that it belongs to.")],
    role: Annotated[Role, Parameter(help="An auditor may fetch all, and submit nothing.")] = "node",
    expires: Annotated[str, Parameter(help="How long the token may be used: 30m, 12h or 7d.")] = "7d",
    auto_approve: Annotated[bool, Parameter(help="Trust the key as soon as it comes.")] = False,
    config: ConfigPath = DEFAULT_CONFIG,
    json: JsonFlag = False,
) -> None:
    """Print a join token for one node, good for one key. Only its hash is kept here."""
    expires_at_s = time.time() + _duration_s(expires)
    store = TrustStore(load_config(config, to_merge=False).federation.trusted)
    token = store.invite(name, org, role, expires_at_s=expires_at_s, approved=auto_approve)
    if json:
        print_json({"name": name, "token": token, "expires_at_s": expires_at_s})
        return
    sys.stdout.write(f"{token}\n")
    stderr.print(
        f"give it to {name} over a safe channel; they run: fedmerge join --token TOKEN ...\n"
        + ("their key is trusted as soon as it comes" if auto_approve else f"then run: fedmerge nodes approve {name}"),
        markup=False,
    )


def approve(name: NodeName, /, *, config: ConfigPath = DEFAULT_CONFIG, json: JsonFlag = False) -> None:
    """Trust a key that was enrolled with a join token. Compare its id with its owner over another channel first."""
    member = TrustStore(load_config(config, to_merge=False).federation.trusted).approve(name)
    if json:
        print_json(_row_of(member, "trusted"))
    else:
        sys.stdout.write(f"trusted {name} of {member.organisation}, key id {member.key.key_id}\n")


def revoke(
    name: NodeName,
    /,
    *,
    reason: Annotated[str, Parameter(help="Why; it is signed into the ledger and told to the node.")],
    config: ConfigPath = DEFAULT_CONFIG,
    json: JsonFlag = False,
) -> None:
    """Trust a node no more, from its next call or chunk on, and list the rounds whose models have its deltas."""
    settings = load_config(config, to_merge=False)
    revoked = TrustStore(settings.federation.trusted).revoke(name, reason)
    rounds = sorted({number for member in revoked for number in _merged_rounds(settings, member)})
    if json:
        print_json({"revoked": [_row_of(member, "revoked") for member in revoked], "merged_in_rounds": rounds})
        return
    for member in revoked:
        sys.stdout.write(f"revoked {name}, key id {member.key.key_id}\n")
    listed = ", ".join(map(str, rounds)) or "none"
    sys.stdout.write(f"rounds whose models have its deltas: {listed}\n")


def _merged_rounds(config: Config, member: Member) -> list[int]:
    if not config.federation.state.exists():
        return []
    from fedmerge.rounds.journal import merged_rounds
    from fedmerge.rounds.state import replay
    from fedmerge.store.database import Database
    from fedmerge.store.ledger import Ledger

    with closing(Ledger(Database(config.database_url()))) as ledger:
        return merged_rounds(replay(ledger.entries), ledger.entries, member.key.key_id)


def _duration_s(text: str) -> float:
    match = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text)
    if match is None:
        raise ConfigError(f"--expires {text}: expected a time such as 30m, 12h or 7d")
    return float(match[1]) * SECONDS[match[2]]


def _row(name: str, organisation: str, role: str, status: str, key_id: str = "") -> dict[str, Any]:
    return {"name": name, "organisation": organisation, "role": role, "status": status, "key_id": key_id}


def _row_of(member: Member, status: str) -> dict[str, Any]:
    row = _row(member.name, member.organisation, member.role, status, member.key.key_id)
    return row | ({"reason": member.reason} if member.reason else {})
