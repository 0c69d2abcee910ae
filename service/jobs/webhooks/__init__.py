"""Tells the receivers of a job's user what happened to it, after Standard Webhooks 1.0."""
