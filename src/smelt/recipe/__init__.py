"""Text <-> typed recipe; touches no tensor.

`parse` reads MergeKit's YAML, strictly and with a few additions, into the records of `schema`; `check` holds them
against the method's declaration; `select` turns settings into numbers; `canonical` writes a recipe back and gives
its digest.
"""
