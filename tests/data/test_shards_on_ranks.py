"""Two ranks and their workers read shards at a URL through one cache on their node."""

import json

import numpy as np
import pytest
import ranks

from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.loader import ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.records import ShardFolder
from tests.data.http_folder import serving

pytestmark = pytest.mark.multiprocess
STEPS = 18  # of two images on two ranks: three epochs
PROGRAM = """
import json, os, sys
from pathlib import Path
from mgcc_dist.data import remote
from mgcc_dist.data.loader import ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.shard_cache import ShardCache
remote.DELAY = 0.01
url, folder, limit, window, steps = sys.argv[1:]
rank = int(os.environ["RANK"])
shards = ShardFolder.open(url, cache=ShardCache(Path(folder), int(limit)))
settings = {"image_size": 16, "seed": 3, "shard_window": int(window) or None}
loader = ImageTrainLoader(None, Stream(shards, 2), ranks=Ranks(rank, 2), workers=2, **settings)
batches = loader.batches(StreamOffsets())
keys = [next(batches)[0].keys for _ in range(int(steps))]
batches.close()
Path(folder, f"rank-{rank}.json").write_text(json.dumps(keys))
"""


@pytest.mark.parametrize("window", [0, 2])
def test_ranks_share_copies_and_see_the_order_of_one_local_rank(tmp_path, window):
    """Also if the first answer for each shard breaks off; with a window, in a cache that does not hold all shards."""
    folder = write_shards(Phantoms(count=24, seed=1, size=16), tmp_path / "data", per_shard=4).folder
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    limit = 5 * largest if window else 0
    (tmp_path / "node").mkdir()
    with serving(folder) as server:
        for path in folder.glob("*.tar"):
            server.faults[path.name] = ["truncated"]
        words = [server.url, tmp_path / "node", limit, window, STEPS]
        ranks.finish(ranks.forked(2), ["-c", PROGRAM, *words])
        requests = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    both = [json.loads((tmp_path / "node" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    settings = {"image_size": 16, "seed": 3, "shard_window": window or None}
    loader = ImageTrainLoader(None, Stream(ShardFolder.open(folder), 2), ranks=Ranks(), **settings)
    one = loader.batches(StreamOffsets())
    expected = [key for _ in range(2 * STEPS) for key in next(one)[0].keys]
    assert np.concatenate([both[0], both[1]], axis=1).ravel().tolist() == expected
    assert len(requests) == 6
    if window:
        assert len(list((tmp_path / "node").rglob("*.tar"))) <= 5
    else:
        assert set(requests.values()) == {2}  # the broken one, and one for all four processes
