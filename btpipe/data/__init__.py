"""Which images, in which order, cropped and coloured how, decoded by DALI into batches."""

PIXELS_VERSION = 1
"""Version of the evaluation view's pixels, raised when the same file would give other ones.

It alone decides whether vectors must be computed anew; another version of btpipe does not.
"""
