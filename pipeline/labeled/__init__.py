"""Readers of labeled faces, one file per format or data set; reader.py opens any of them."""
