"""Training on of compressed models, towards the dense model that they were made from."""
