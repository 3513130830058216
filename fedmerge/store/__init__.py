"""Step 8, store: the ledger of events, the blobs they name, and the uploads under way."""

from fedmerge.store.blobs import BlobStore
from fedmerge.store.ledger import Ledger, LedgerEntry, UploadRow

__all__ = ["BlobStore", "Ledger", "LedgerEntry", "UploadRow"]
