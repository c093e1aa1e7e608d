"""btpipe: from a folder of unlabelled images to an encoder and a table of vectors."""

__version__ = "0.1.0"
