"""Step 8, store: the ledger of events, the blobs they name, and the uploads under way.

Nothing is imported here: the ledger needs SQLAlchemy, and who merges or verifies on their own only needs blobs.
"""
