"""What makes the method practical; nothing here is needed to understand it."""
