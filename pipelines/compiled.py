"""How the kernels for CPUs are compiled, and where numba keeps what it has made."""

import os
import tempfile

import numpy as np
from numba import config, njit

f32, i32, u32, u8 = np.float32, np.int32, np.uint32, np.uint8

compiled = njit(nogil=True, cache=True, error_model="numpy")
try:
    compiled(lambda: None)
except RuntimeError:  # neither beside this file nor in the home folder, as in a container run by another user
    # A new folder each time: what lies in it is executed, so it must be nobody else's. Workers look into the environment.
    config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="inscon-numba-")
