"""Configuration, environment, errors, files, logging, progress, process groups, signals and threads."""
