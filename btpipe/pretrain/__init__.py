"""From views of unlabelled images to an encoder: network, loss, optimiser, checkpoints."""
