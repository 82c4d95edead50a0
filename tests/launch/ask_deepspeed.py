"""Print, as JSON, how DeepSpeed reads the files argv[1:], by name. test_configs.py runs it.

A separate process, because importing DeepSpeed changes the process.
"""

import json
import sys
from pathlib import Path

from deepspeed.runtime.config import DeepSpeedConfig

read = {}
for path in map(Path, sys.argv[1:]):
    settings = json.loads(path.read_text())
    assert settings["gradient_clipping"] == "auto"
    # The values that Accelerate and the training loop set for "auto"; one process sees a world size of one.
    settings |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    settings["train_batch_size"] = 4
    config = DeepSpeedConfig(settings)
    zero = config.zero_config
    read[path.name] = {
        "stage": int(zero.stage),
        "bf16": config.bfloat16_config.enabled,
        "offload": [target and str(target.device) for target in (zero.offload_optimizer, zero.offload_param)],
    }
print(json.dumps(read))
