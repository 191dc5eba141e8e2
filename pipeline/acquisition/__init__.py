"""Active learning: which unlabeled faces to have annotated next; functions.py names them all."""
