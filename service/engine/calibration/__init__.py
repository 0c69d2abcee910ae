"""What a user has measured of a model's inputs: the file that holds it, its checks, and what methods are handed."""
