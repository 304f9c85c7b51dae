"""What a prediction is worth: the domain of the training data, the uncertainty, and the comparison at every step."""
