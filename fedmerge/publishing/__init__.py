"""Step 12, publish: a model directory that anybody can open and check, and exports for auditors."""
