"""Teachers of distillation: found and pinned, loaded, and asked to write."""
