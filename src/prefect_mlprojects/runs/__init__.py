"""What `run()` does around the flow."""
