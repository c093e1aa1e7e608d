"""From a folder of images and a bundle to a table of vectors, as a transaction."""
