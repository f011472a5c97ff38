"""Files of models: loaded, saved, and what is recorded in them."""
