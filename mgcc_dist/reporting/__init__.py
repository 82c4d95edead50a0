"""Turn finished run folders into tables and pages; used by `mgcc report`."""
