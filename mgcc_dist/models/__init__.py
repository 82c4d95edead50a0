"""Segmentation networks, one file each; `network.build_network` builds one from its config."""
