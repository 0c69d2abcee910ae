"""What the numbers become: one module per family of number formats."""
