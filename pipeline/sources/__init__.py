"""Readers of unlabeled faces, one file per format; reader.py cuts slices and reads them."""
