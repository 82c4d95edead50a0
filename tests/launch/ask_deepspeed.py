"""Prints, as JSON, what DeepSpeed makes of its files argv[1:], by name; started by test_configs.py.

A process of its own, because to import DeepSpeed changes the process.
"""

import json
import sys
from pathlib import Path

from deepspeed.runtime.config import DeepSpeedConfig

read = {}
for path in map(Path, sys.argv[1:]):
    settings = json.loads(path.read_text())
    assert settings["gradient_clipping"] == "auto"
    # As Accelerate and the training loop fill in what is "auto"; a rank alone sees a world of one.
    settings |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    settings["train_batch_size"] = 4
    config = DeepSpeedConfig(settings)
    zero = config.zero_config
    read[path.name] = {
        "stage": int(zero.stage),
        "bf16": config.bfloat16_config.enabled,
        "offload": [where and str(where.device) for where in (zero.offload_optimizer, zero.offload_param)],
    }
print(json.dumps(read))
