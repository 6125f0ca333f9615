"""Two bundles with full logits beside each other: how far two runs of one model are apart, position by position.

A measurement, not a verdict. ``pairing`` finds what can be compared, ``bundles`` reads it, ``figures`` holds the formulas.
"""
