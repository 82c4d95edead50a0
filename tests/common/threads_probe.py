"""Print, as JSON, the threads of a program of the package; a process of its own, which launchers start as one."""

import importlib
import json
import os
import sys

sys.orig_argv[1:] = ["-m", "mgcc_dist.segment"]  # as which this script is started
importlib.import_module("mgcc_dist")  # sets them
torch = importlib.import_module("torch")

names = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
shown = {name: os.environ.get(name) for name in names} | {"threads": torch.get_num_threads()}
print(json.dumps(shown) + "\n", end="", flush=True)
