"""The transparency log: RFC 6962 trees, proofs and notes, and members who compare what they were shown."""
