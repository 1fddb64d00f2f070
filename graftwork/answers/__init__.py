"""What an answer's text says, and what it is worth against a gold object, a schema, or a list of choices."""
