"""How tensors lie in files: one module per format."""
