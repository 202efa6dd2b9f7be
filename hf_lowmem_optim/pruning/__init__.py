"""I-OBS, pruning that knows the curvature: while fine-tuning (``pruner``), or layer by layer (``layers``)."""
