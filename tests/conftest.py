"""One thread a test process: small tensors gain nothing from more, and bits do not depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
