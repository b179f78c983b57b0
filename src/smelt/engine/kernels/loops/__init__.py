"""The loops that numba compiles. Nothing here is imported where their compiled code is on disk (`kernels.loading`)."""
