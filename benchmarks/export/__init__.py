"""How fast a program runs that has left Python, beside the model that it was made of."""
