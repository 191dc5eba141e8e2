"""Training: one loop, one objective per method."""
