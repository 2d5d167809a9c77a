"""Pictures in, captions or likelihoods out."""
