"""Print, as JSON, the threads of a program of the package; a process of its own, which launchers start as one."""

import json
import os
import sys

sys.orig_argv[1:] = ["-m", "mgcc_dist.segment"]  # as which this script is started
import mgcc_dist  # noqa: F401, E402  # sets them
import torch  # noqa: E402

names = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
shown = {name: os.environ.get(name) for name in names} | {"threads": torch.get_num_threads()}
print(json.dumps(shown) + "\n", end="", flush=True)
