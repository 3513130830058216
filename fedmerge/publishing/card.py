"""The model card: README.md of a published model, in the form the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge.delta.adapter_writer import AdapterSummary
from fedmerge.merge.recipe import step_names
from fedmerge.statements import LocalInput, MergeRecord


def model_card(record: MergeRecord, base_name: str, adapter: AdapterSummary | None = None) -> str:
    """Return the card of the model that `record` describes: what it is, who contributed, how to check it.

    `adapter` is the one beside it, if there is one.
    """
    header = _header(base_name, ["merge", "fedmerge", "federated", *step_names(record.merge)])
    rows = [
        f"| `{c.node_id[:12]}` | {c.num_examples:,} | {'-' if c.norm is None else f'{c.norm:.4g}'} "
        f"| {_weight(c.weight)} | {c.payload_bytes / 1e6:.2f} MB "
        f"| {'merged' if c.accepted else 'screened: ' + c.reason} |"
        for c in record.contributions
    ]
    total_bytes = sum(c.payload_bytes for c in record.contributions)
    body = f"""
# {record.federation}, round {record.round}

A model merged from the task vectors of {len(record.contributions)} organisations, none of which shared its data.
Version `{record.model.digest}`, made from base `{record.model.base_digest[:12]}` ({base_name}).

## Contributions to this round

| node (key id) | examples | norm of delta | weight | sent | verdict |
|---|---|---|---|---|---|
{chr(10).join(rows)}

{total_bytes / 1e6:.2f} MB came in, in all.{_search(record)}

## How it was merged

```json
{json.dumps({"merge": record.merge, "seed": record.merge_seed, "outer": record.outer}, indent=2)}
```
{_adapter(adapter)}
## How to check it

`lineage.json` names every file here by SHA-256 and is signed by the coordinator (`lineage.sig.json`);
`provenance.jsonl.zst` holds what each party signed on the way. With the coordinator's public key:

```
fedmerge verify . --key coordinator.pem
```
"""
    return header + body


def _adapter(summary: AdapterSummary | None) -> str:
    if summary is None:
        return ""
    least = f" Of `{summary.least[0]}` it keeps least, {summary.least[1]:.4%}." if summary.energy < 0.9999 else ""
    return f"""
## As an adapter

`adapter/` is the change of the base as a LoRA adapter for PEFT, of rank {summary.rank}: it keeps {summary.energy:.4%}
of the change's energy, which is the sum of squares.{least}
"""


def _search(record: MergeRecord) -> str:
    search = record.search
    if search is None:
        return ""
    return (
        f" The weights are the best of {len(search.scores)} candidates by the mean score of {len(search.panel)} "
        f"organisations on their own test data, {search.scores[search.chosen]}."
    )


def local_card(
    base_name: str, inputs: Sequence[LocalInput], recipe: Mapping[str, Any], seed: int, model_digest: str
) -> str:
    """Return the card of a model that was merged from local checkpoints."""
    rows = [f"| {item.name} | `{item.digest[:12]}` | {_weight(item.weight)} |" for item in inputs]
    return f"""{_header(base_name, ["merge", "fedmerge", *step_names(recipe)])}
# Merge of {len(inputs)} fine-tunes of {base_name}

Version `{model_digest}`.

| model | version | weight |
|---|---|---|
{chr(10).join(rows)}

```json
{json.dumps({"merge": dict(recipe), "seed": seed}, indent=2)}
```
"""


def _weight(weight: object) -> str:
    return f"{weight:g}" if isinstance(weight, float) else f"`{json.dumps(weight)}`"


def _header(base_name: str, tags: list[str]) -> str:
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(base_name)}",
        "base_model_relation: merge",
        f"tags: {json.dumps(tags)}",
        "---",
    ]
    return "\n".join(lines) + "\n"
