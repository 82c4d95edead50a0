"""Model folders to and from the Hugging Face Hub: the work of `mgcc push` and `mgcc pull`.

Only the files of a model folder are transferred. Weights are safetensors, and nothing is unpickled or run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mgcc_dist.common.errors import UserError, reason_of
from mgcc_dist.common.files import create_folder, link, scratch_folder
from mgcc_dist.inference.config import PullConfig, PushConfig
from mgcc_dist.inference.loading import read_weights
from mgcc_dist.inference.model_folder import CARD, FILES, read_model, verify_model
from mgcc_dist.train.initial_weights import MODEL, WEIGHTS, find_weights

logger = logging.getLogger(__name__)
LOG_IN = "Log in by `hf auth login`, or set HF_TOKEN to a token that may"
LARGEST = 4 * 2**30
"""bytes of a file that `pull` downloads"""


def push(config: PushConfig) -> None:
    """Upload a model folder in one commit, and create the repository if it does not exist.

    Raises:
        UserError: the folder is not a complete model folder, or the Hub can't be reached or refuses.
    """
    weights = find_weights(config.model, "best")
    folder = weights.parent
    if not (folder / MODEL).is_file():
        read_weights(weights)  # what is no network can't be exported either
        raise UserError(
            f"--model {config.model}: is not a model folder. Export it first: mgcc export --run {config.model} "
            "--to safetensors --out DIR"
        )
    verify_model(folder)
    if not (folder / CARD).is_file():
        raise UserError(f"{folder}: has no {CARD}, the model card. Export it again with --overwrite.")
    api = HfApi()
    with _explained(config.repo, "write to it"):
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        names = [name for name in FILES if (folder / name).is_file()]
        message = f"mgcc push: {read_model(folder)['name']}"
        commit = api.upload_folder(
            repo_id=config.repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message=message,
            revision=config.revision,
        )
    logger.info("push: %s -> %s", folder, commit.commit_url)


def pull(config: PullConfig) -> None:
    """Download a model folder, verify it, and move it to `out`.

    Raises:
        UserError: `out` exists and is something else; the repository is absent or no model folder; or the Hub can't be
            reached.
    """
    out = config.out or Path(config.repo.rpartition("/")[2])
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.exists() and (not out.is_dir() or any(name not in FILES for name in names)):
        raise UserError(f"--out {out}: exists and is not a model folder. Choose another --out.")
    if names and not config.overwrite:
        raise UserError(f"--out {out}: already holds a model. Choose another --out, or use --overwrite.")
    api = HfApi()
    with scratch_folder(out) as folder:
        with _explained(config.repo, "read it"):
            info = api.model_info(config.repo, revision=config.revision, files_metadata=True)
            sizes = {each.rfilename: each.size or 0 for each in info.siblings or []}
            if missing := [name for name in (WEIGHTS, MODEL) if name not in sizes]:
                raise UserError(f"{config.repo}: has no {missing[0]}, so it is not a model folder of mgcc-dist")
            for name in (name for name in FILES if name in sizes):
                if sizes[name] > LARGEST:
                    raise UserError(
                        f"{config.repo}: {name} has {sizes[name]:,} bytes, which is not a model of this package"
                    )
                api.hf_hub_download(config.repo, name, revision=info.sha, local_dir=folder)
        try:
            verify_model(folder)
        except UserError as error:
            raise UserError(f"{config.repo}: {str(error).replace(f'{folder}/', '')}") from error
        create_folder(out)
        for name in FILES:
            if (folder / name).is_file():
                link(folder / name, out / name)
            else:
                (out / name).unlink(missing_ok=True)
    logger.info("pull: %s at commit %s -> %s. Use it by --model %s.", config.repo, (info.sha or "")[:12], out, out)


@contextmanager
def _explained(repo: str, what: str) -> Iterator[None]:
    """Turn what the Hub's library raises into one line; `what` a token must be allowed to do."""
    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{repo}: is not the name of a repository, such as USER/NAME") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it.") from error
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repo}: needs a token. {LOG_IN} {what}.") from error
    except GatedRepoError as error:
        raise UserError(f"{repo}: is gated. Ask for access on its page. {LOG_IN} {what}.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo}: has no such revision. Choose another --revision.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{repo}: does not exist, or your token may not see it. {LOG_IN} {what}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = f" {LOG_IN} {what}." if status in (401, 403) else " Try again later." if status >= 500 else ""
        raise UserError(
            f"{repo}: the Hub answered {status} ({reason_of(error.server_message or error)}).{remedy}"
        ) from error
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        if not _is_network_error(error):
            raise
        raise UserError(
            f"{repo}: the Hub can't be reached ({reason_of(error)}). Check the network, or HF_ENDPOINT."
        ) from error


def _is_network_error(error: BaseException) -> bool:
    """Whether it is an error of the HTTP library, or was caused by one."""
    chain = (error, error.__cause__, error.__context__)
    return any(type(each).__module__.partition(".")[0] in ("httpx", "httpx2", "requests") for each in chain)
