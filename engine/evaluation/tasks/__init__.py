"""Long-context tasks that download nothing, made to an exact length with the model's own tokenizer."""
