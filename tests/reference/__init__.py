"""Slow, plain float64 twins of the merge methods: whole tensors, numpy only, nothing from smelt."""
