"""Data that stages exchange: records, chat templates, the tokenisation rule, packed shared-prefix rows."""
