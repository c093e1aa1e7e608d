"""Which images, in which order, cropped and coloured how, decoded by DALI into batches."""
