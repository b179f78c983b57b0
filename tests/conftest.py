"""What all tests share: property tests are judged by their properties, never by the speed of the machine."""

import os

from hypothesis import settings

settings.register_profile("smelt", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("smelt")
