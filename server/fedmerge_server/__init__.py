"""The coordinator as a gRPC service."""
