"""Before any test imports torch: one thread a process. Workers and parties share the cores, and threads that wait for
each other spin.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
