"""What all tests share: property tests are judged by their properties, never by the speed of the machine."""

import os

# The references' matrices are small: threads would only wait for each other. (The engine holds LAPACK at one itself.)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("smelt", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("smelt")
