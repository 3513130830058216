"""A partner site's end: the gRPC session, the node loop and the trainers."""
