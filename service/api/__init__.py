"""The HTTP surface: translates between the wire and the layers below."""
