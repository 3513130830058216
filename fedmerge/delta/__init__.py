"""Steps 1 to 5: a task vector made sparse, quantised, coded and framed, each step with its inverse beside it."""
