"""Step 9, screen: a verdict for each delta, alone and beside the others, and rules that bound what bad nodes can do."""
