"""What vectors and encoders are worth on labelled images: neighbours, classifiers, baselines."""
