"""Print, as JSON, the thread settings of a program. test_threads.py starts this script as launchers start a program."""

import importlib
import json
import os
import sys

sys.orig_argv[1:] = ["-m", "mgcc_dist.segment"]  # pretend to be this program
importlib.import_module("mgcc_dist")  # configures the threads
torch = importlib.import_module("torch")

names = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
shown = {name: os.environ.get(name) for name in names} | {"threads": torch.get_num_threads()}
print(json.dumps(shown) + "\n", end="", flush=True)
