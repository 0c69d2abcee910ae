"""Where the arithmetic runs: one module per backend, named by its id."""
