"""Files of models: load them, save them, and keep the record of what was factored in them."""
