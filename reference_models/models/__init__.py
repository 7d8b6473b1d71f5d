"""Networks, which receive their attributes from the open `routing(...)` scope."""
