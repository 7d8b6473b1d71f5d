"""Networks that take their attributes from the open `routing(...)` scope."""
