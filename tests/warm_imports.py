"""What the processes of `tests.warm` are forked from: whatever commands import, but not what they leave out."""

# ruff: noqa: F401

import os

# As `fedmerge` sets them before it imports these packages, which print what it says itself.
os.environ |= {"GRPC_VERBOSITY": "NONE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import numba
import torch

import fedmerge.cli
import fedmerge.coordinator.coordinator
import fedmerge.local.assemble
import fedmerge.node.node
import fedmerge_client.link
import fedmerge_client.train.causal_lm
import fedmerge_client.train.text_classification
import fedmerge_server.run
