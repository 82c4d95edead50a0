"""Load the network, bind a port of this machine, and serve the page until Ctrl-C: the work of `mgcc serve`."""

import errno
import logging
import os
import secrets
import socket
import sys
import webbrowser
from pathlib import Path

import uvicorn

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.words import counted
from mgcc_dist.data.dicom_regions import Spacing
from mgcc_dist.data.images import bits_used
from mgcc_dist.inference.folder import spacing_option
from mgcc_dist.inference.predictor import load
from mgcc_dist.inference.sources import list_sources
from mgcc_dist.inference.uncertainty import open_members
from mgcc_dist.serving.app import create_app
from mgcc_dist.serving.config import ServeConfig
from mgcc_dist.serving.corrections import Corrections
from mgcc_dist.serving.predictions import Segmenter
from mgcc_dist.serving.queue import Queue
from mgcc_dist.serving.session import Session

logger = logging.getLogger("mgcc_dist.serve")

ADDRESS = "127.0.0.1"
OPENER = "open.html"
SECONDS_TO_FINISH = 10
"""for requests that run at Ctrl-C, such as a save"""


def serve(config: ServeConfig) -> None:
    """Serve the page of `config` until a signal.

    Raises:
        UserError: an option is wrong, the port is in use, or `out` can't be written.
    """
    if config.order == "uncertainty" and config.uncertainty is None:
        raise UserError("--order uncertainty: needs a score. Leave out --uncertainty none.")
    spacing = spacing_option(config.spacing)
    listener = bind(config.port)
    with listener:
        session = _open_session(config, spacing)
        token = secrets.token_urlsafe(32)
        address = f"http://{ADDRESS}:{listener.getsockname()[1]}/#{token}"
        app = create_app(session, token, config.max_upload_mb * 2**20)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=SECONDS_TO_FINISH,
            )
        )
        progress = session.queue.progress()
        if config.images:
            logger.info("serve: %s, %d corrected", counted(progress["total"], "image"), progress["corrected"])
        logger.info("serve: corrections -> %s. Ctrl-C stops the server.", config.out)
        print(address, flush=True)
        opener = config.out / OPENER
        try:
            if not config.no_browser:
                _open_browser(address, opener)
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn sends itself the signal again, when all requests are answered
            pass
        finally:
            session.close()
            opener.unlink(missing_ok=True)
        logger.info("serve: stopped; %d corrections in %s", session.corrections.count(), config.out)


def _open_session(config: ServeConfig, spacing: Spacing | None) -> Session:
    sources = list_sources([Path(path) for path in config.images], config.out) if config.images else []
    predictor = load(config.run, config.weights)
    members = open_members(config.uncertainty, [predictor], config.members, config.weights)
    segmenter = Segmenter(predictor, members, config.uncertainty)
    corrections = Corrections(config.out)
    bits = bits_used(source.path for source in sources if not source.dicom and not source.problem)
    queue = Queue(sources, corrections, segmenter, bits, spacing, config.order == "uncertainty")
    return Session(segmenter, corrections, queue, spacing)


def bind(port: int) -> socket.socket:
    """Listen on a port of this machine, before the work that a wrong one would waste.

    Raises:
        UserError: it is in use, or not allowed.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        problem = "is in use" if in_use else f"can't be used ({getattr(error, 'strerror', error)})"
        raise UserError(f"--port {port}: {problem}. Choose another one, or leave it out for any free one.") from error
    return listener


def _open_browser(address: str, opener: Path) -> None:
    """Open the page, if this machine has a screen.

    The browser gets a file that leads to the address: other users of the machine can read the words of a command, and
    would see the token.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    opener.unlink(missing_ok=True)
    opener.touch(mode=0o600)
    opener.write_text(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
    try:
        webbrowser.open(opener.resolve().as_uri())
    except (webbrowser.Error, OSError) as error:
        logger.warning("serve: no browser could be opened (%s). Open the address yourself.", error)
