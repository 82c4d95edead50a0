"""Configuration, environment, errors, files, logging, process groups and signals."""
