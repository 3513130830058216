"""Step 12, publish: a directory that transformers opens, and that anybody who has the coordinator's key can check.

Beside the weights, config and tokenizer stand README.md (a model card), provenance.jsonl.zst (every signed round
spec, delta statement and merge record on the way to this version, as they travelled), what other tools check it by (see
`attest`), lineage.json (a statement that names every file by SHA-256) and lineage.sig.json (its envelope). The folder
adapter/ holds the change of the base as a LoRA adapter, if one is asked for. The directory appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from fedmerge.delta.adapter_writer import write_adapter
from fedmerge.delta.task_vector import UpdatedModel, delta_schema
from fedmerge.errors import reporting_os_errors
from fedmerge.files import sync_directory, sync_tree
from fedmerge.local.assemble import Assembly
from fedmerge.merge import Write
from fedmerge.models.versions import write_model
from fedmerge.models.weights import writing_weights
from fedmerge.publishing.attest import MODEL_KEY, MODEL_SIGNATURE, SLSA_PROVENANCE, model_signature, slsa_provenance
from fedmerge.publishing.card import local_card, model_card
from fedmerge.publishing.provenance_file import PROVENANCE
from fedmerge.statements import Lineage, LocalMerge, MergeRecord
from fedmerge.tensors import Checkpoint, Computed, model_digest
from fedmerge.trust.sign import SigningKey

LINEAGE = "lineage.json"
SIGNATURE = "lineage.sig.json"
CARD = "README.md"
ADAPTER = "adapter"


def publish(
    model: UpdatedModel,
    base: Checkpoint,
    record: MergeRecord,
    target: Path,
    *,
    base_name: str,
    key: SigningKey,
    model_key: SigningKey,
    write_provenance: Callable[[Path], None],
    node_keys: Mapping[str, str],
    adapter_rank: int = 0,
    durable: bool = True,
) -> None:
    """Write and sign the published directory of a model version at `target`.

    `base_name` is what the card calls the base model. `adapter_rank` is the largest rank of the adapter beside the
    model; 0 is for none. `model_key` is a P-256 key, for other tools. `write_provenance` writes a provenance file,
    and `node_keys` has the PEM public key by key id of each node that signed something in it. Repeating it replaces the
    directory by an equal one; it waits for the disk if it is to be `durable`. Raises `ResourceError`.
    """
    with appearing_whole(target, durable=durable) as partial:
        write_model(model, base, partial)
        write_provenance(partial / PROVENANCE)
        adapter = None
        if adapter_rank:
            change = Computed(delta_schema(base.schema), model.change)
            adapter = write_adapter(partial / ADAPTER, change, base, adapter_rank, base_name=base_name)
        (partial / CARD).write_text(model_card(record, base_name, adapter))
        (partial / MODEL_KEY).write_text(model_key.public.pem())
        files = file_digests(partial)
        (partial / SLSA_PROVENANCE).write_bytes(slsa_provenance(record, files, model_key))
        files = file_digests(partial, known=files)
        _write_model_signature(partial, target.name, files, model_key)
        lineage = Lineage(
            federation=record.federation,
            run=record.run,
            files=file_digests(partial, known=files),
            model=record.model,
            node_keys=dict(sorted(node_keys.items())),
            software=record.software,
        )
        (partial / LINEAGE).write_bytes(lineage.to_payload())
        (partial / SIGNATURE).write_bytes(lineage.sign(key))


def thin_out(models: Path, round_number: int, keep_rounds: int) -> None:
    """Delete what was published in `models` over `keep_rounds` rounds before this one, but for the signed lineage.

    That is what an export has of it. Raises `ResourceError`.
    """
    for directory in sorted(models.glob("round-*")):
        number = directory.name.removeprefix("round-")
        if not (number.isdecimal() and int(number) <= round_number - keep_rounds):
            continue
        with reporting_os_errors(directory):
            for path in directory.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in {LINEAGE, SIGNATURE}:
                    path.unlink()


def publish_local(
    assembly: Assembly,
    fill: Callable[[Write], None],
    target: Path,
    *,
    max_shard_bytes: int | None = None,
    seed: int,
    key: SigningKey | None,
    side_files: Mapping[str, str] | None = None,
) -> str:
    """Write a model that was merged here, with a card and lineage.json, signed if there is a `key`; return its digest.

    `fill(write)` writes all of the assembly's tensors, in any order, as `Assembly.merge` with this `seed` does. They
    are sharded as the host is, or into files of at most `max_shard_bytes`. Config and tokenizer come after the weights:
    without them, no tool takes an interrupted attempt for a model. `side_files` are further texts, by file name. Raises
    `ResourceError`.
    """
    inputs, recipe, host = assembly.inputs(), assembly.job.to_dict(), assembly.host
    assembly.config_changes()  # what can't be done is said before it is merged
    with appearing_whole(target) as partial:
        with writing_weights(partial, assembly.schema, assembly.shards(max_shard_bytes)) as writer:
            fill(writer.write)
        digest = model_digest(Checkpoint(partial))
        assembly.write_side_files(partial)
        for name, text in (side_files or {}).items():
            (partial / name).write_text(text)
        (partial / CARD).write_text(local_card(host.directory.name, inputs, recipe, seed, digest))
        files = file_digests(partial)
        if key is not None and key.public.algorithm == "p256":
            (partial / MODEL_KEY).write_text(key.public.pem())
            files = file_digests(partial, known=files)
            _write_model_signature(partial, target.name, files, key)
        statement = LocalMerge(
            files=file_digests(partial, known=files),
            model_digest=digest,
            base_digest=model_digest(host),
            inputs=inputs,
            merge=recipe,
            merge_seed=seed,
            software=software_versions(),
        )
        (partial / LINEAGE).write_bytes(statement.to_payload())
        if key is not None:
            (partial / SIGNATURE).write_bytes(statement.sign(key))
    return digest


@contextmanager
def appearing_whole(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a scratch directory to write into, and put it at `target`, synced if `durable`, when the block succeeds.

    What was at `target` is replaced. Raises `ResourceError` for what the operating system refuses.
    """
    partial = target.absolute().with_name(f".{target.absolute().name}.partial")
    with reporting_os_errors(target):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if durable:
                sync_tree(partial)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if durable:
            sync_directory(partial.parent)


def plain_files(directory: Path) -> list[Path]:
    """Return the files in `directory` and in its adapter's folder, sorted by name."""
    return sorted(path for folder in (directory, directory / ADAPTER) for path in folder.glob("*") if path.is_file())


def file_digests(directory: Path, *, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the SHA-256 (hex) of every file in `directory`, by name, but for the lineage and its signature.

    Those of the adapter have its folder's name before theirs. Files that are `known` are not read again.
    """
    found: dict[str, str] = {}
    for path in plain_files(directory):
        name = path.relative_to(directory).as_posix()
        if known and name in known:
            found[name] = known[name]
        elif name not in {LINEAGE, SIGNATURE}:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _write_model_signature(directory: Path, name: str, files: Mapping[str, str], key: SigningKey) -> None:
    ignored = (MODEL_SIGNATURE, LINEAGE, SIGNATURE)
    (directory / MODEL_SIGNATURE).write_bytes(model_signature(name, files, ignored, key))


def software_versions() -> dict[str, str]:
    """Return the versions of what the numbers in a merge depend on."""
    packages = ("fedmerge", "torch", "numpy", "safetensors", "zstandard")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
