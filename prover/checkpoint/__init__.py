"""Checkpoints made here: a small model rounded into the formats that providers serve, on a CPU, in seconds.

Nothing here imports torch but :mod:`~fpforensics.prover.checkpoint.library`, for the formats that only a library writes.
"""
