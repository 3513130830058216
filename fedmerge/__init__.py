"""fedmerge: model merging as the communication step between organisations."""
