"""Upload a model folder to the Hugging Face Hub.

    mgcc export --run out/runs/mgcc_1 --to safetensors --out models/mgcc_1
    mgcc push USER/mgcc_1 --model models/mgcc_1

Uploads its files (weights as safetensors, model.json, model card) in one commit, and nothing else. The token is that of
`hf auth login` or HF_TOKEN; HF_ENDPOINT names another Hub. See docs/how-to/models.md.
"""

from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.inference.config import PushConfig


def run(config: PushConfig) -> None:
    """Upload the model folder."""
    from mgcc_dist.inference.hub import push

    push(config)


PROGRAM = Program("push", __doc__, Command(PushConfig, run, "upload a model folder to the Hugging Face Hub", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("push", main)
