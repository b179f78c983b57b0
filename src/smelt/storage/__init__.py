"""Bytes <-> tensors: reading checkpoints safely and writing them whole or not at all.

Nothing here has ever heard of merging. `files` is the only module that touches the operating system; `header` decides
what is a valid safetensors file; `checkpoint` reads byte ranges of tensors; `sources` finds checkpoints (a folder, the
hub cache, memory); `writer` lays an output out in full before the first byte and commits it with one rename.
"""
