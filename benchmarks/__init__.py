"""Measurements of btpipe on a machine: commands, never tests; not part of the wheel."""
