"""Containers in which the programs of jobs run: `container:` in a cluster file.

The batch script itself runs outside. It stages, starts srun, and requeues the job, so an image needs no Slurm.
"""

import os
import re
import shlex
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError, did_you_mean

RUNTIMES = ("apptainer", "singularity", "pyxis")
REGISTRY = re.compile(r"[a-z-]+://")
"""beginning of an image that the runtime pulls: docker://, oras://, library://"""
PYTHON = "python3"
"""in the image"""
FORBIDDEN = re.compile(r'["`\s]')
"""characters that would end the quotes in which the batch script has a value"""


@dataclass(frozen=True)
class Container:
    runtime: str
    """apptainer, singularity, or pyxis (Slurm's plugin for enroot)"""
    image: str
    """a .sif file or a folder, for pyxis a .sqsh file; or an image of a registry"""
    binds: tuple[str, ...] = ()
    """folders to bind in addition to those of the job, such as /local/$USER or /data/v2:/data; variables are those of
    the node"""
    args: tuple[str, ...] = ()
    """further options of `apptainer exec`, or of srun for pyxis"""

    @property
    def image_file(self) -> Path | None:
        """The image on this machine's disks; None if it comes from a registry."""
        path = Path(os.path.expandvars(self.image)).expanduser()
        if self.runtime == "pyxis":
            is_file = path.suffix == ".sqsh" or self.image.startswith(("/", ".", "~", "$"))
        else:
            is_file = not REGISTRY.match(self.image)
        return path.absolute() if is_file else None

    def check(self) -> list[str]:
        """Check what can be checked before a job is submitted; return warnings.

        Raises:
            UserError: the image does not exist.
        """
        if self.image_file and not self.image_file.exists():
            registry = "nvcr.io#ORG/IMAGE" if self.runtime == "pyxis" else "docker://ORG/IMAGE"
            raise UserError(
                f"container.image: {self.image_file} does not exist. Build it (docs/how-to/containers.md), or name an "
                f"image of a registry, like {registry}."
            )
        if self.runtime != "pyxis" and not shutil.which(self.runtime):
            return [f"container.runtime: {self.runtime} is not on the PATH here. It must be on that of the nodes."]
        return []

    def python(self, folders: Iterable[Path], scratch: str | None, gpus: bool) -> str:
        """Return the shell words that start Python in the container, after srun's own.

        Args:
            folders: existing folders that the program uses
            scratch: a folder on the nodes' own disks, which may contain variables
            gpus: whether it uses NVIDIA GPUs
        """
        image = f'"{self.image_file or self.image}"'
        own = [f"{quote(folder)}:{quote(folder)}" for folder in outermost(folders)]
        extra = [
            f'"{bind}"' if ":" in bind else f'"{bind}:{bind}"'
            for bind in (*([scratch] if scratch else []), *self.binds)
        ]
        args = [shlex.quote(arg) for arg in self.args]
        folder = shlex.quote(str(Path.cwd()))
        if self.runtime == "pyxis":  # which gives a container GPUs by itself
            mounts = [f"--container-mounts={','.join([*own, *extra])}"]
            return " ".join([f"--container-image={image}", *mounts, f"--container-workdir={folder}", *args, PYTHON])
        binds = [word for bind in [*own, *extra] for word in ("--bind", bind)]
        # Not --pid: Slurm's signals must reach Python, and those that the runtime forwards as well.
        nv = ["--nv"] if gpus else []
        return " ".join([self.runtime, "exec", *binds, "--pwd", folder, *nv, *args, image, PYTHON])

    def python_in_batch_script(self, words: str) -> str:
        """Return the shell words that start what `python` returned outside of a job step."""
        if self.runtime != "pyxis":
            return words
        return f"srun --overlap --nodes=1 --ntasks-per-node=1 --ntasks=1 {words}"


FIELDS = tuple(Container.__dataclass_fields__)


def read_container(source: str, keys: dict[str, Any]) -> Container:
    """Check the keys of `container:`.

    Raises:
        UserError: a key is missing, unknown, or has a value that is not possible.
    """
    where = f"{source}: container"
    for key, value in keys.items():
        if key not in FIELDS:
            raise UserError(
                f"{where}: unknown key {key!r}.{did_you_mean(key, FIELDS)} Known keys: {', '.join(FIELDS)}."
            )
        several = key in ("binds", "args")
        if several and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise UserError(f"{where}.{key} must be a list of strings, got {value!r}")
        if not several and not isinstance(value, str):
            raise UserError(f"{where}.{key} must be a string, got {value!r}")
        for text in [value] if key == "image" else value if key == "binds" else []:
            if not text:
                raise UserError(f"{where}.{key} must not be empty")
            if FORBIDDEN.search(text):
                raise UserError(f"{where}.{key} must be without quotes and spaces, got {text!r}")
    for key in ("runtime", "image"):
        if key not in keys:
            raise UserError(f"{where}: {key} is missing. Set runtime ({', '.join(RUNTIMES)}) and image.")
    runtime = keys["runtime"]
    if runtime not in RUNTIMES:
        hint = did_you_mean(runtime, RUNTIMES)
        raise UserError(f"{where}.runtime: expected one of {', '.join(RUNTIMES)}, got {runtime!r}.{hint}")
    for bind in keys.get("binds", ()):
        if not bind.startswith(("/", "$")) or "," in bind:
            raise UserError(f"{where}.binds must be absolute paths, like /data or /data/v2:/data, got {bind!r}")
    for arg in keys.get("args", ()):
        if not arg.startswith("-"):
            raise UserError(f"{where}.args must be options with their dashes, like --fakeroot, got {arg!r}")
    return Container(runtime, keys["image"], tuple(keys.get("binds", ())), tuple(keys.get("args", ())))


def existing_folders(values: Iterable[Any], outputs: Iterable[Path]) -> set[Path]:
    """Return the folders that a program uses: those named in its settings that exist, and those of its outputs.

    Args:
        values: any settings; texts that are not paths of existing files or folders are ignored
        outputs: files that may not exist yet; their nearest existing parent folder counts
    """
    folders = set()
    for text in {text for value in values for text in _texts(value)}:
        path = Path(text).absolute()
        with suppress(OSError):  # a text that is too long for a path
            if path.exists():
                # Not a file itself: a bound file keeps its old content when a new one replaces it.
                folders.add(path if path.is_dir() else path.parent)
    for output in outputs:
        folders.add(next(parent for parent in output.absolute().parents if parent.is_dir()))
    return folders


def outermost(folders: Iterable[Path]) -> list[Path]:
    """Return the folders with the targets of links, without those that lie in another one and without /."""
    found = {Path(os.path.normpath(folder)) for folder in folders}
    found |= {folder.resolve() for folder in found}
    found.discard(Path("/"))
    return sorted(folder for folder in found if not found & set(folder.parents))


def quote(folder: Path) -> str:
    """Quote a folder to be bound.

    Raises:
        UserError: its name has characters with a meaning in options of container runtimes.
    """
    if re.search("[:,]", str(folder)):
        raise UserError(f"{folder}: cannot be bound into a container, because of its `:` or `,`. Rename it.")
    return shlex.quote(str(folder))


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) and value else []
