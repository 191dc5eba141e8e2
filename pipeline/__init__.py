"""OmniFER: a better facial expression model from few labels and many unlabeled faces.

Start reading at :mod:`pipeline.stages`: one short function per stage, in the order a face meets
them.
"""

__version__ = "0.1.0"
