"""Training methods, one file each; `registry.build` builds one from its config."""
