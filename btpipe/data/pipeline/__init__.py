"""From files to batches: order, decoding, augmentation, training and evaluation views."""
