"""One data set shared out among simulated nodes, as evenly or as unevenly as a federation's data may be.

Every function takes the group of each row (its label or domain, say) and returns the rows of each node, so that every
row is somebody's and nobody is without any.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge.errors import InputError, did_you_mean, reporting_os_errors

Rows = NDArray[np.int64]


def iid(groups: Sequence[str], num_nodes: int, alpha: float, generator: np.random.Generator) -> list[Rows]:
    """Give everybody the same number of rows, give or take one, drawn at random."""
    return np.array_split(generator.permutation(len(groups)), num_nodes)


def by_size(groups: Sequence[str], num_nodes: int, alpha: float, generator: np.random.Generator) -> list[Rows]:
    """Draw rows at random, and how many each node gets from a Dirichlet distribution: the less alpha, the less even."""
    return _split(generator.permutation(len(groups)), generator.dirichlet(np.full(num_nodes, alpha)))


def dirichlet(groups: Sequence[str], num_nodes: int, alpha: float, generator: np.random.Generator) -> list[Rows]:
    """Share out each group by a Dirichlet distribution of its own (1909.06335, as in 2102.02079).

    With a large alpha all nodes have the groups in like shares, with a small one each has few groups.
    """
    shares: list[list[Rows]] = [[] for _ in range(num_nodes)]
    for members in _members(groups, generator):
        for node, part in enumerate(_split(members, generator.dirichlet(np.full(num_nodes, alpha)))):
            shares[node].append(part)
    return [np.concatenate(parts) for parts in shares]


def by_group(groups: Sequence[str], num_nodes: int, alpha: float, generator: np.random.Generator) -> list[Rows]:
    """Give each node rows of one group alone (of several, where there are more groups than nodes)."""
    members = _members(groups, generator)
    if len(members) >= num_nodes:
        return [np.concatenate(members[node::num_nodes]) for node in range(num_nodes)]
    nodes: list[Rows] = []
    for index, rows in enumerate(members):
        nodes += np.array_split(rows, len(range(index, num_nodes, len(members))))
    return nodes


PARTITIONS: dict[str, Callable[[Sequence[str], int, float, np.random.Generator], list[Rows]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "group": by_group,
    "size": by_size,
}


def partition(groups: Sequence[str], num_nodes: int, scheme: str, *, alpha: float, seed: int) -> list[list[int]]:
    """Return the rows of each of `num_nodes` nodes, sorted, by one of `PARTITIONS`.

    A node that the scheme leaves without a row gets one from whoever has most. Raises `InputError` when there are more
    nodes than rows.
    """
    if num_nodes > len(groups):
        raise InputError(f"{len(groups)} rows can't be shared out among {num_nodes} nodes")
    parts = PARTITIONS[scheme](groups, num_nodes, alpha, np.random.Generator(np.random.PCG64(seed)))
    shares = [sorted(map(int, part)) for part in parts]
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return shares


def _members(groups: Sequence[str], generator: np.random.Generator) -> list[Rows]:
    """Return the rows of each group, shuffled, in the order of their names."""
    names = np.asarray(groups)
    return [generator.permutation(np.flatnonzero(names == name)) for name in np.unique(names)]


def _split(rows: Rows, proportions: NDArray[np.float64]) -> list[Rows]:
    return np.split(rows, np.floor(np.cumsum(proportions)[:-1] * len(rows)).astype(np.int64))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines or CSV file; raise `InputError` when it is not one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"{path}: can't be read ({getattr(err, 'strerror', None) or 'not text'})") from err
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as err:
            raise InputError(f"{path}:{number}: not JSON ({err})", hint="one JSON object per line, or a .csv") from err
        if record is not None and not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        if record:
            records.append(record)
    return records


def share_out(
    source: Path,
    files: Sequence[tuple[Path, Path | None]],
    scheme: str,
    by: str,
    *,
    alpha: float,
    seed: int,
    test_share: float,
) -> None:
    """Write each node's part of `source` as JSON Lines, to its two `files`: of its rows, `test_share` to the second.

    `by` is the column that says a row's group, where the scheme needs one. Raises `InputError`.
    """
    records = read_records(source)
    if scheme in {"dirichlet", "group"} and any(by not in record for record in records):
        columns = sorted({column for record in records for column in record})
        raise InputError(
            f"{source}: not every row has a column {by!r}{did_you_mean(by, columns)}",
            hint=f"simulate.by says which column to share out by; there are {', '.join(columns)}",
        )
    groups = [str(record.get(by, "")) for record in records]
    shares = partition(groups, len(files), scheme, alpha=alpha, seed=seed)
    for (train, test), rows in zip(files, shares, strict=True):
        # Every so many rows, so that both parts have the same groups.
        held_out = set(rows[:: round(1 / test_share)]) if test is not None and len(rows) > 1 else set()
        with reporting_os_errors(train):
            train.parent.mkdir(parents=True, exist_ok=True)
            write_records(train, [records[row] for row in rows if row not in held_out])
            if test is not None:
                write_records(test, [records[row] for row in sorted(held_out or rows)])


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
