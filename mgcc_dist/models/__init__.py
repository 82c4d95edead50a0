"""Segmentation networks, one file each; `registry.build_network` builds one from its config."""
