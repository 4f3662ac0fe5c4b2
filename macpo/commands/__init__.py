"""What `macpo COMMAND` does, one module per command."""
