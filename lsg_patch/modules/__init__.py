"""What is put into a model."""
