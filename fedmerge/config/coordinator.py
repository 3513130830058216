"""The sections of fedmerge.toml on the federation, its model, and its coordinator's address and stores."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from fedmerge.config.section import Section
from fedmerge.config.values import (
    Address,
    BlobsUrl,
    DatabaseUrl,
    FilePath,
    Labels,
    Name,
    Positive,
    Size,
    is_private,
    parse_address,
)
from fedmerge.errors import InputError


class Federation(Section):
    """Who the federation is, and where its coordinator keeps things."""

    name: Name = Field(examples=["my-federation"])
    """Name of the federation: letters, digits, '-', '_' and '.'. It is signed into every statement."""
    state: FilePath = Path("state")
    """Folder of the ledger, the uploaded deltas and the published model versions."""
    key: FilePath = Path("coordinator.key")
    """The coordinator's private signing key; made on first start when there is none."""
    trusted: FilePath = Path("trusted")
    """Folder of the nodes' public keys, one NAME.pem each; fill it with: fedmerge keys trust."""


class Model(Section):
    """The model that every node starts from."""

    base: FilePath = Field(examples=["base-model"])
    """Folder of the base model, as Hugging Face saves it: config.json and safetensors weights."""
    name: str | None = Field(default=None, min_length=1, max_length=200, examples=["organisation/base-model"])
    """What the base model is called in public; model cards name it. Without it they say the folder's name."""
    labels: Labels = Field(default=None, examples=[["negative", "positive"]])
    """Makes a classification head for these labels on a plain encoder: a list of names, or the path of a text file
    with one name per line."""

    def label_names(self) -> tuple[str, ...] | None:
        """Return the label names, read from the file if they stand in one; raise `InputError` if it has no use."""
        if not isinstance(self.labels, Path):
            return self.labels
        try:
            names = tuple(line.strip() for line in self.labels.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"{self.labels}: can't be read ({getattr(err, 'strerror', None) or 'not text'})") from err
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(f"{self.labels}: should hold two or more different label names, one per line")
        return names


class Server(Section):
    """The address nodes connect to, and what one of them may send."""

    listen: Address = "127.0.0.1:8700"
    """Address to listen on, host:port; port 0 takes any free one. "0.0.0.0:8700" listens on every interface."""
    tls_cert: FilePath | None = Field(default=None, examples=["server.crt"])
    """Certificate chain (PEM) of your own, together with tls_key. Without them a self-signed certificate is made."""
    tls_key: FilePath | None = Field(default=None, examples=["server.key"])
    """Private key (PEM) of tls_cert."""
    ca: FilePath | None = Field(default=None, examples=["ca"])
    """Folder of the federation's own certificate authority; make it with: fedmerge keys ca. It issues the coordinator's
    certificate, if there is no tls_cert, and those of nodes."""
    client_certificates: Literal["off", "required"] = "off"
    """Whether nodes must show a certificate of the authority in ca, or of client_ca, to connect at all."""
    client_ca: FilePath | None = Field(default=None, examples=["partners-ca.crt"])
    """Certificates (PEM) of other authorities whose client certificates are accepted."""
    certificate_hours: float = Field(default=24.0, gt=0, le=8760)
    """How long a node's certificate lasts; nodes renew it after half of that."""
    max_payload_bytes: Size = Field(default=2 << 30, examples=["2GiB"])
    """Largest delta a node may upload, in bytes or as "500MB", "2GiB"."""
    max_uploads: Positive = 32
    """Deltas that may stream in at once, one of each node; who finds no place is told to come back. Each takes about
    13 MiB of memory."""
    max_downloads: Positive = 128
    """Files that may stream out at once, one to each node; who finds no place is told to come back."""
    max_bytes_per_s: Size | None = Field(default=None, examples=["20MB"])
    """Bytes per second that a node may send, and as many that it may fetch; a faster one is slowed down."""
    idle_s: float = Field(default=60.0, gt=0)
    """Seconds for 1 MiB to arrive from a node, or to be taken by it; a slower or silent one loses its place, and
    resumes where it stood. Where all places are taken, it gives way to another node after a sixth of that."""
    lease_s: float = Field(default=15.0, ge=1)
    """Seconds without a sign of life after which a coordinator that stands by, on the same database, takes over."""

    @field_validator("tls_key")
    @classmethod
    def _both_or_none(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_cert" in info.data and (value is None) != (info.data["tls_cert"] is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        return value

    @field_validator("client_ca")
    @classmethod
    def _has_an_authority(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if info.data.get("client_certificates") == "required" and value is None and info.data.get("ca") is None:
            raise ValueError('client_certificates = "required" needs ca or client_ca')
        return value

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        return parse_address(self.listen)

    @property
    def is_local(self) -> bool:
        """Whether nodes are near: `listen` is an address of a private network."""
        return is_private(self.address[0])


class Store(Section):
    """Where the coordinator keeps what it must not lose; by default all of it is in federation.state."""

    database: DatabaseUrl = Field(default=None, examples=["postgresql+psycopg://fedmerge@db.example.org/fedmerge"])
    """Database of the ledger: "sqlite:///FILE", or a PostgreSQL server's (needs the extra postgres). A password rather
    belongs in the environment: FEDMERGE_STORE__DATABASE or PGPASSWORD."""
    blobs: BlobsUrl = Field(default=None, examples=["s3://bucket/prefix"])
    """Where deltas, updates and steps lie: a folder, or a bucket of an object store that speaks S3 (needs the extra s3;
    credentials are taken from the environment, AWS_ACCESS_KEY_ID and so on)."""
