"""What goes over the wire: pydantic models, by resource."""
