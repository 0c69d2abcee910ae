"""Fuzzing of everything that reads what strangers send: targets, valid inputs, and ways to spoil them."""
