"""The record and the card beside every output: what was merged from what, with which numbers."""
