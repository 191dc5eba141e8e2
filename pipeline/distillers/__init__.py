"""Data set distillation: what makes a few synthetic images stand for many faces."""
