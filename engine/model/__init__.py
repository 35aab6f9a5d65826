"""Loading of transformers models, and the seam through which they attend."""
