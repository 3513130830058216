"""Merges of checkpoints that lie on this machine: of which layers, repaired, and spread over a Ray cluster."""
