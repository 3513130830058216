"""Generated from protos/fedmerge/v1; do not edit. Run `make protos`."""
