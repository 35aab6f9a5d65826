"""Loading of transformers models, with attention that calls the engine."""
