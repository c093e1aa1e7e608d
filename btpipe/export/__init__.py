"""From a run to a bundle: weights and an ONNX encoder that agree, and how to use them."""
