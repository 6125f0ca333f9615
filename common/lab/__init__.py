"""The uniform experiment JSON of the ablation studies: read, write, validate.

One document holds what an experiment measured: metadata, configurations, and runs with the signals of each
step. ``reader`` opens one (also larger than memory), ``writer`` writes one, ``schema`` says what is wrong with
one. Arrays are float64, which holds every number of a JSON file exactly.
"""
