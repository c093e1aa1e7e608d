"""Questions to a table of vectors, from the parquet file alone."""
