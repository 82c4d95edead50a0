"""Download a model folder from the Hugging Face Hub, and verify it.

    mgcc pull USER/mgcc_1 --out models/mgcc_1
    mgcc predict --model models/mgcc_1 image.png

Reads only the files of a model folder: weights as safetensors, model.json, the model card. Nothing is unpickled or run.
The folder gets its name after its hashes were checked and its network was loaded. See docs/how-to/models.md.
"""

from mgcc_dist.common.errors import run_program
from mgcc_dist.common.program import Command, Program
from mgcc_dist.inference.config import PullConfig


def run(config: PullConfig) -> None:
    """Download the model folder."""
    from mgcc_dist.inference.hub import pull

    pull(config)


PROGRAM = Program("pull", __doc__, Command(PullConfig, run, "download a model from the Hugging Face Hub", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("pull", main)
