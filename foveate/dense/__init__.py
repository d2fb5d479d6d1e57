"""Dense tasks: maps of several strides from any ViT, reduced or not, and heads on them."""
