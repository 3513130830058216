"""Whom to believe: keys and how they open, signatures, whose keys are trusted, the authority for TLS."""
