"""Where bytes come from and go to: one module per URI scheme."""
