"""What of a model is trained and how: adapters by peft's rules and layout, or every weight that text goes through."""
