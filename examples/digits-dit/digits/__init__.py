"""A small diffusion transformer and a small UNet for digits of 8 by 8 pixels, in NumPy."""
