"""Looking around in a table of vectors: search, duplicates, outliers, maps."""
