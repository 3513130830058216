"""A Flower App: an ordinary ClientApp, and a ServerApp that merges by one of fedmerge's methods."""
