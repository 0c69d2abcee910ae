"""Jobs: what is queued, running and done, and the rules by which it becomes so."""
