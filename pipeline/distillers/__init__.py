"""Data set distillation: what makes a few images stand for many faces.

Learned images (distribution, gradient, unrolled, trajectory) share one interface,
:class:`learned.Distiller`; chosen ones (coresets, crops) are functions from real faces to images.
training/distill.py runs them all.
"""
