"""Bounds on what one file may cost; nothing heavy is imported here, so the command line may."""

DECODE_SECONDS = 20.0
"""For one decode: the largest image that is accepted takes 4 s on one core."""
