"""How an encoder is judged by training a classifier on it: the published numbers."""

from typing import Annotated

from pydantic import Field

from btpipe.recipe.tables import Count, NotNegative, Positive, Table


class Protocol(Table):
    """SGD with a cosine over epochs; rates are for 256 images and scale with the batch.

    With `encoder_lr` 0 the encoder is frozen, in evaluation mode, and without weight gradients.
    """

    epochs: Count = 100
    batch_size: Count = 256
    lr: Positive = 0.3
    """Of the classifier."""
    encoder_lr: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-6
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


LINEAR = Protocol()
"""facebookresearch/barlowtwins, evaluate.py: its defaults."""
SEMISUP = Protocol(epochs=20, lr=0.5, encoder_lr=0.005, weight_decay=0.0)
"""The same, README, 1 % and 10 % of the labels: `--weights finetune --epochs 20 --lr-backbone 0.005
--lr-classifier 0.5 --weight-decay 0`. (The paper's appendix: 0.002, stepped at 12 and 16.)"""
