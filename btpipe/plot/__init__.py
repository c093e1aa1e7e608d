"""Where runs went: their history as a page, a picture, TensorBoard's files."""
