"""captioner: caption images with a VGG16 encoder, an LSTM language model and beam search."""

__version__ = "0.1.0"
