"""Programs that answer one question each: `python -m experiments.NAME --help`."""
