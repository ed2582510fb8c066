"""Language models from layers."""
