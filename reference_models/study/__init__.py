"""The study: when does an attribute-aware router help, when not, and how sure is that."""
