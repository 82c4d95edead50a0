#!/bin/sh
# Install the package and exactly the versions of constraints.txt into /opt/venv.
# Usage, in the source tree: containers/install.sh TORCH_INDEX EXTRAS (TORCH_INDEX: a URL, or `default`)
set -eu
python3 -m venv /opt/venv
PATH=/opt/venv/bin:$PATH
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first, from its own index: the next line then finds that version installed.
pip install $([ "$1" = default ] || echo "--index-url $1") "$(grep '^torch==' constraints.txt)"
pip install -c constraints.txt ".[$2]"
python -c "import torch, mgcc_dist.segment; print(mgcc_dist.__version__, torch.__version__)"
