"""Samples per second from local shards, over HTTP and from the node-local cache, next to plain webdataset.

    python -m benchmarks.shard_sources --out benchmarks/results/shard_sources-cpu.json

All decode image and mask of each record of phantom shards and check the sha256 of both, in one process. `http` starts
with an empty cache and fetches every shard from a server on this machine; `cached` finds all shards in the cache.
`webdataset` reads the tars in order with webdataset.WebDataset, `in order` with this package; the others read in random
order. The five are measured alternately; a rate is the median over the rounds.
"""

import argparse
import hashlib
import json
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import webdataset

from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.order import permutation
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.shard_cache import ShardCache


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def read(shards: ShardFolder, order: Iterable[int]) -> int:
    return sum(shards[int(index)].mask is not None for index in order)


def shuffled(shards: ShardFolder) -> int:
    return read(shards, permutation(0, 0, 0, len(shards)))


def read_by_webdataset(urls: list[str]) -> int:
    def verified(record: dict[str, bytes]) -> dict[str, bytes]:
        meta = json.loads(record["json"])
        for file, key in (("png", "sha256"), ("mask.png", "mask_sha256")):
            assert hashlib.sha256(record[file]).hexdigest() == meta[key]
        return record

    return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False).map(verified).decode("l8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.getLogger("mgcc_dist").setLevel(logging.WARNING)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "shards"
        write_shards(Phantoms(options.images, 0, options.size), folder)
        urls = sorted(str(path) for path in folder.glob("*.tar"))
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        caches = iter(range(10**6))

        def over_http(cache: str) -> int:
            return shuffled(ShardFolder.open(url, cache=ShardCache(Path(scratch) / cache)))

        sources: dict[str, Callable[[], int]] = {
            "webdataset": lambda: read_by_webdataset(urls),
            "in order": lambda: read(ShardFolder.open(folder, verify=False), range(options.images)),
            "local": lambda: shuffled(ShardFolder.open(folder, verify=False)),
            "http": lambda: over_http(f"empty-{next(caches)}"),
            "cached": lambda: over_http("full"),
        }
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(options.rounds + 1):  # the first is for warming up
            for name, source in sources.items():
                began = time.perf_counter()
                assert source() == options.images
                if turn:
                    rates[name].append(options.images / (time.perf_counter() - began))
        server.shutdown()
    plain = rates["webdataset"]
    rows = {
        name: {
            "samples_per_second": round(statistics.median(values), 1),
            "relative_to_webdataset": round(
                statistics.median(mine / theirs for mine, theirs in zip(values, plain, strict=True)), 2
            ),
        }
        for name, values in rates.items()
    }
    write_json(options.out, {**benchmark_header("benchmarks.shard_sources"), "images": options.images, "rows": rows})
    for name, row in rows.items():
        print(f"{name:12} {row}")


if __name__ == "__main__":
    main()
