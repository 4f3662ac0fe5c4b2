"""What a recipe or a model needs and how long it takes, before anything runs."""
