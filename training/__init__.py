"""Training of the small checkpoints in `assets/` on procedural video."""
