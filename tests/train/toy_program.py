"""The toy task of test_loop.py as a program that a test can kill: FOLDER STEPS."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_loop import CONFIG, run

config = replace(CONFIG, steps=int(sys.argv[2]), epochs=None, checkpoint_every=1, log_every=5)
run(Path(sys.argv[1]), config)
