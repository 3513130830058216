"""Model versions: the base plus updates, by reference, and what takes one version to the next, bit for bit."""
