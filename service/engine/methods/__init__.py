"""How scale and zero point are found: one module per method, named by its id."""
