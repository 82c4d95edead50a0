"""Run `mgcc_dist.ldm` without DeepSpeed's collectives in shared memory. test_zero.py starts it."""

import runpy

import ranks

ranks.disable_shared_memory()
runpy.run_module("mgcc_dist.ldm", run_name="__main__", alter_sys=True)
