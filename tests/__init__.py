import os

# Of several processes of tests (pytest -n) each has one thread: more would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
