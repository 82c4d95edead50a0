"""Serve a folder on a port of this machine, with the faults of real servers."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL = 2.0  # seconds, longer than the timeout of the tests


class FaultyServer(ThreadingHTTPServer):
    """Serves `folder`. `faults` holds for a file name what goes wrong with its next requests, one after the other."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, list[str]] = {}
        self.requests = Counter()


class _Handler(SimpleHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.requests[name] += 1
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else ""
        if fault.isdecimal():
            self.send_error(int(fault))
        elif fault == "dropped":
            self.close_connection = True
        elif fault in ("truncated", "stalled"):
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stalled":
                time.sleep(STALL)
        else:
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
