"""Training methods, one file each; `method.build` builds one from its config."""
